"""The sequences that the page offers are those of the data that ship."""

from scripts.page_examples import main


def test_examples_are_those_of_the_data():
    assert main(is_check=True) == 0
