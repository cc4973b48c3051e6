module rnnserve-example

go 1.19
