"""service.spill: what was put comes back or is known to be lost, whole or not at all, in a file that is ours alone."""

import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import ConfigError, SpillFailed, SpillLost
from service.spill import SpillStore

ROWS = [(key, bytes([key]) * 3_000) for key in range(20)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "states.db"


@pytest.fixture
def store(path):
    store = SpillStore(path)
    store.put(ROWS)
    yield store
    store._db.close()


def test_rows_come_back_until_they_are_replaced_or_deleted(store):
    assert [store.get(key, 3_000) for key, _ in ROWS] == [data for _, data in ROWS]
    store.put([(0, b""), (2**40, b"\x00\xff")])
    store.delete([1, 2, 99])
    assert (store.get(0, 0), store.get(2**40, 2), store.get(3, 3_000), len(store)) == (b"", b"\x00\xff", ROWS[3][1], 19)
    with pytest.raises(SpillLost, match="it is not there"):
        store.get(1, 3_000)


def test_model_versions_have_keys_of_their_own(store):
    assert [store.add_lane() for _ in range(2)] == [2**32, 2**33]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("UPDATE state SET data = substr(data, 2) WHERE key = 7", "its length or checksum is wrong"),
        ("UPDATE state SET data = zeroblob(3000) WHERE key = 7", "its length or checksum is wrong"),
        ("UPDATE state SET data = 'text' WHERE key = 7", "its length or checksum is wrong"),
        ("UPDATE state SET checksum = 1 WHERE key = 7", "its length or checksum is wrong"),
        ("DELETE FROM state WHERE key = 7", "it is not there"),
    ],
)
def test_a_damaged_row_is_lost_alone(store, caplog, damage, message):
    store._db.execute(damage)
    with pytest.raises(SpillLost, match=f"{message}.*open a new session") as caught:
        store.get(7, 3_000)
    assert (caught.value.code, store.get(8, 3_000)) == ("DATA_LOSS", ROWS[8][1])
    assert f"row 7 of spill_store {store.path} is lost" in caplog.text


def test_a_file_that_is_damaged_under_a_server_loses_rows_and_makes_none_up(store):
    size = store.path.stat().st_size
    with store.path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    store._db.execute("PRAGMA cache_size = 0")
    store._db.execute("PRAGMA shrink_memory")
    kept = 0
    for key, data in ROWS:
        try:
            assert store.get(key, 3_000) == data
            kept += 1
        except SpillLost:
            pass
    assert 0 < kept < len(ROWS)


def test_a_full_disk_refuses_all_of_a_transaction_and_is_told_once(store, caplog):
    [pages] = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    more = [(0, b"new"), *((key, b"x" * 3_000) for key in range(100, 200))]
    for _ in range(2):
        with pytest.raises(SpillFailed, match=r"database or disk is full.*send again after a while") as caught:
            store.put(more)
    assert (caught.value.code, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 1.0)
    assert (len(store), store.get(0, 3_000)) == (20, ROWS[0][1])
    assert caplog.text.count("can't be written") == 1
    store._db.execute(f"PRAGMA max_page_count = {pages * 10}")
    with caplog.at_level("INFO"):
        store.put(more)
    assert (len(store), store.get(0, 3)) == (120, b"new")
    assert "can be written again" in caplog.text


@pytest.mark.parametrize(("bad", "error"), [(object(), SpillFailed), (2**70, OverflowError)])
def test_a_transaction_that_breaks_in_the_middle_changes_nothing_and_the_next_is_whole(store, bad, error):
    with pytest.raises(error):
        store.delete([1, bad])
    assert (len(store), store.get(1, 3_000)) == (20, ROWS[1][1])
    store.delete([1])
    assert len(store) == 19


def test_a_file_of_before_is_emptied_and_so_is_one_that_is_closed(path):
    store = SpillStore(path)
    store.put(ROWS)
    store._db.close()  # as a killed server leaves it
    assert path.stat().st_size > 60_000
    store = SpillStore(path)
    assert (len(store), path.stat().st_size < 60_000) == (0, True)
    store.put(ROWS)
    store.close()
    assert path.stat().st_size < 60_000
    assert len(SpillStore(path)) == 0


@pytest.mark.parametrize("damage", [lambda data: data[:100] + b"\xff" * (len(data) - 100), lambda data: data[:8192]])
def test_a_file_of_ours_that_a_crash_damaged_is_made_anew(path, damage):
    store = SpillStore(path)
    store.put(ROWS)
    store._db.close()
    path.write_bytes(damage(path.read_bytes()))
    store = SpillStore(path)
    store.put(ROWS)
    assert store.get(5, 3_000) == ROWS[5][1]


def database(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE state (key INTEGER PRIMARY KEY, checksum INTEGER, data BLOB)")
    db.commit()
    db.close()


@pytest.mark.parametrize(
    "make", [database, lambda path: path.write_bytes(b"notes" * 99), lambda path: path.write_bytes(b"x")]
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(path, make):
    make(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"spill_store {path} is a file of something else.*name another") as caught:
        SpillStore(path)
    assert (caught.value.field, path.read_bytes()) == ("spill_store", before)
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_file_is_as_good_as_none_and_a_new_one_is_for_its_owner_alone(path):
    path.touch()
    SpillStore(path).put(ROWS)
    new = path.with_name("new.db")
    SpillStore(new)
    assert stat.S_IMODE(new.stat().st_mode) == 0o600


def test_a_second_server_is_refused_and_the_first_goes_on(store):
    with pytest.raises(ConfigError, match="another server has it: give each server its own"):
        SpillStore(store.path)
    code = f"from pathlib import Path; from service.spill import SpillStore; SpillStore(Path({str(store.path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another server has it" in other.stderr
    store.put([(1, b"on")])
    assert (store.get(1, 2), len(store)) == (b"on", 20)


@pytest.mark.parametrize("name", ["none/states.db", "folder"])
def test_a_file_that_cannot_be_made_says_where_to_put_it(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"can't be written.*name a file in a directory that the server may write to"):
        SpillStore(tmp_path / name)
