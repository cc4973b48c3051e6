"""A local file for the states of idle sessions, so that memory holds only those in use.

Laws:
    get(key) after put(key, data) gives data, bit for bit, or raises: a row of another length or checksum is never given
    put and delete happen whole or not at all
    the file is empty after the store is opened, and after it is closed: the sessions of its rows are gone
    no file but a spill store's own, or a new one, is ever written to; one server at a time has it

It spills, it does not keep: nothing is synced to the disk and the journal is in memory, so a crash of the machine may
leave the file damaged; the next start makes it anew. Calls happen on the event loop; many rows are one transaction.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from service.errors import ConfigError, SpillFailed, SpillLost

log = logging.getLogger(__name__)

APPLICATION_ID = 0x726E6E73
"""Marks a file as a spill store ("rnns")."""
_MARK = APPLICATION_ID.to_bytes(4, "big")  # as it stands at byte 68 of the file
RETRY_S = 1.0


class SpillStore:
    """Rows of bytes by number, in one SQLite file."""

    def __init__(self, path: Path) -> None:
        """Take the file and empty it, or make it. Raises ConfigError where it can't be written, or isn't ours alone."""
        self.path = path
        self._num_lanes = 0
        self._is_failing = False
        try:
            self._db = _open(path)
        except (sqlite3.Error, OSError) as error:
            code = _code(error)
            if code == sqlite3.SQLITE_NOTADB:
                raise _foreign(path) from error
            why = (
                "another server has it: give each server its own"
                if code == sqlite3.SQLITE_BUSY
                else f"it can't be written ({error}): name a file in a directory that the server may write to"
            )
            raise ConfigError(f"spill_store {path}: {why}", field="spill_store") from error

    def add_lane(self) -> int:
        """Give a model version a range of 2**32 keys. Returns the first one."""
        self._num_lanes += 1
        return self._num_lanes << 32

    def put(self, rows: Sequence[tuple[int, bytes]]) -> None:
        """Write rows (key, data), in place of those of the same keys. Raises SpillFailed, changing nothing."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO state VALUES (?, ?, ?)", [(key, zlib.crc32(data), data) for key, data in rows]
            )

    def get(self, key: int, num_bytes: int) -> bytes:
        """Read a row that has so many bytes. Raises SpillLost where it can't be had as it was."""
        try:
            row = self._db.execute("SELECT checksum, data FROM state WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._lost(key, str(error)) from error
        if row is None:
            raise self._lost(key, "it is not there")
        checksum, data = row
        if not isinstance(data, bytes) or len(data) != num_bytes or zlib.crc32(data) != checksum:
            raise self._lost(key, "its length or checksum is wrong")
        return data

    def delete(self, keys: Sequence[int]) -> None:
        """Delete rows, those that aren't there too. Raises SpillFailed, changing nothing."""
        with self._transaction():
            self._db.executemany("DELETE FROM state WHERE key = ?", [(key,) for key in keys])

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM state").fetchone()[0])

    def close(self) -> None:
        """Empty the file and leave it to others."""
        with suppress(sqlite3.Error):  # the next one to open it empties it
            _empty(self._db)
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):
                if self._db.in_transaction:  # SQLite may have gone back by itself
                    self._db.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            if not self._is_failing:  # told once, not for each of the sessions that run into it
                log.error("spill_store %s can't be written: %s", self.path, error)
            self._is_failing = True
            raise SpillFailed(
                f"the states of idle sessions can't be moved out of memory to make room ({error}); the server's log "
                "says where, send again after a while",
                retry_after_s=RETRY_S,
            ) from error
        if self._is_failing:
            log.info("spill_store %s can be written again", self.path)
            self._is_failing = False

    def _lost(self, key: int, why: str) -> SpillLost:
        log.error("row %d of spill_store %s is lost: %s", key, self.path, why)
        return SpillLost(f"the state of this session was spilled and can't be read back ({why}); open a new session")


def _open(path: Path) -> sqlite3.Connection:
    """Open the file, lock others out, and empty it; one that a crash has damaged is made anew.

    Raises ConfigError for a file of something else, sqlite3.Error and OSError.
    """
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        if _code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or path.read_bytes()[68:72] != _MARK:
            raise
    path.unlink()
    return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    with suppress(FileExistsError):  # a new one is for this user alone
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    is_new = path.stat().st_size == 0
    db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        if not is_new and db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise _foreign(path)
        _format(db)
    except (sqlite3.Error, ConfigError):
        db.close()
        raise
    return db


def _format(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = MEMORY")
    db.execute("PRAGMA synchronous = OFF")
    db.execute("BEGIN EXCLUSIVE")
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("COMMIT")
    _empty(db)
    db.execute("CREATE TABLE state (key INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, data BLOB NOT NULL)")


def _empty(db: sqlite3.Connection) -> None:
    db.execute("DROP TABLE IF EXISTS state")
    db.execute("VACUUM")


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 for an error of the operating system."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _foreign(path: Path) -> ConfigError:
    return ConfigError(
        f"spill_store {path} is a file of something else, which would be lost: name another", field="spill_store"
    )
