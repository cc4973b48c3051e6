"""service.parcels: what is read is what was written."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.events import Answer
from service.parcels import Parcel, pack, unpack
from service.policies import Priority
from service.sessions import Kept, Terms

arrays = st.lists(
    st.builds(
        lambda name, shape, seed: np.asarray(np.random.default_rng(seed).standard_normal(shape) * 9, name),
        st.sampled_from(["float32", "float64", "int64", "int32", "bool"]),
        st.lists(st.integers(0, 4), max_size=3),
        st.integers(0, 99),
    ),
    max_size=3,
)
parcels = st.builds(
    Parcel,
    terms=st.builds(
        Terms,
        session_id=st.text(max_size=9),
        linger_s=st.floats(0, 9),
        replay_window=st.integers(0, 2**20),
        priority=st.sampled_from(Priority),
    ),
    position=st.integers(0, 2**60),
    kept_from=st.integers(0, 2**60),
    kept=st.none() | st.builds(Kept, st.integers(0, 2**60), st.integers(0, 99), arrays),
    used_at=st.floats(0, 1e9),
    states=arrays,
    gathered=arrays,
    given=arrays,
    answers=st.lists(
        st.builds(Answer, st.just([0]), st.lists(st.integers(0)), st.lists(st.integers(0)), arrays), max_size=3
    ),
)


@settings(deadline=None)
@given(st.lists(parcels, max_size=3))
def test_parcels_are_read_as_they_were_written(given_parcels):
    read = unpack(pack(given_parcels))
    assert repr(read) == repr(given_parcels)
