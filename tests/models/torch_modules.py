"""Torch modules as people write them, to be exported."""

import torch
from torch import nn
from torch.nn.utils import rnn as rnn_utils
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.nn.utils.rnn import pad_packed_sequence as unpack


class Tagger(nn.Module):
    """An answer to every step."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.rnn = nn.GRU(4, 5, num_layers=2, batch_first=True, dropout=0.3, **settings)
        self.head = nn.Linear(10 if self.rnn.bidirectional else 5, 2)

    def forward(self, x):
        out, _ = self.rnn(self.encoder(x))
        return self.head(out)


class LastStep(nn.Module):
    """The output of the last step, classified; time comes first."""

    def __init__(self, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=bidirectional)
        self.head = nn.Linear(8 if bidirectional else 4, 3)

    def forward(self, x):
        self.lstm.flatten_parameters()
        h0 = torch.zeros(self.lstm.num_layers * (1 + self.lstm.bidirectional), x.size(1), self.lstm.hidden_size)
        out, _ = self.lstm(x, (h0, torch.zeros_like(h0)))
        return self.head(out[-1]).softmax(-1)


class LastState(nn.Module):
    """Ids in; packed; the last hidden states of both directions, classified."""

    def __init__(self, *, bidirectional: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, padding_idx=0)
        self.lstm = nn.LSTM(4, 5, batch_first=True, bidirectional=bidirectional, bias=False)
        self.head = nn.Linear(10 if bidirectional else 5, 3)

    def forward(self, ids, lengths):
        packed = pack_padded_sequence(self.table(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (h, _) = self.lstm(packed)
        return self.head(torch.cat(list(h), dim=-1))


class Stateful(nn.Module):
    """States in and out of its forward, packing under another name, and an output per sequence too."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4, nonlinearity="relu")
        self.inner = nn.ModuleDict({"gru": nn.GRU(4, 4)})

    def forward(self, x, seq_lens, state=None):
        packed = rnn_utils.pack_padded_sequence(x, seq_lens, enforce_sorted=False)
        y, state = self.rnn(packed, state)
        y = PackedSequence(y.data.tanh() + 1, y.batch_sizes, y.sorted_indices, y.unsorted_indices)
        out, _ = unpack(self.inner["gru"](y)[0], padding_value=-1.0)
        shifted, lengths = unpack(y)
        return {"steps": out, "mean": shifted.sum(0) / lengths[:, None], "state": state}


class Pooled(nn.Module):
    """The mean over a row's own steps, which no step knows before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x, lengths):
        out, _ = self.gru(x)
        within = torch.arange(x.shape[1])[None, :] < lengths[:, None]
        return (out * within[:, :, None]).sum(1) / lengths[:, None]


class Careless(nn.Module):
    """A mean over padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0].mean(1)
