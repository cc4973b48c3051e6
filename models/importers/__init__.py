"""Models from elsewhere: saved Keras files, and torch modules that hold nn.RNN, nn.LSTM or nn.GRU."""
