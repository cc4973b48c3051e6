"""Counts of one lane, for the metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """What a lane has done since it was loaded."""

    steps: int = 0
    runs: int = 0
    run_rows_sum: int = 0
    run_seconds: float = 0.0
    run_rows: dict[int, int] = field(default_factory=dict)
    """Runs by number of rows, rounded up to a power of two."""
    sequences: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Refusals by reason."""
    spills: int = 0
    """States moved out of memory, to the spill store."""
    restores: int = 0
    """States moved back."""
    spill_errors: int = 0
    """Failures of the spill store."""

    def count_run(self, num_rows: int, num_steps: int, seconds: float) -> None:
        """Count a run."""
        bucket = 1 << (num_rows - 1).bit_length()
        self.runs += 1
        self.steps += num_steps
        self.run_rows_sum += num_rows
        self.run_seconds += seconds
        self.run_rows[bucket] = self.run_rows.get(bucket, 0) + 1

    def count_rejected(self, reason: str) -> None:
        """Count a refusal."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
