"""Make tests/data/speech.npz: sentences spoken by espeak-ng, 16 kHz, with silence between them.

python scripts/speech.py     needs espeak-ng (Debian: apt install espeak-ng)
"""

import io
import subprocess
import wave
from pathlib import Path

import numpy as np

RATE = 16_000
SENTENCES = (
    ("en", "The river was high that morning, and nobody crossed it."),
    ("de", "Bitte legen Sie den Brief auf den Tisch."),
    ("en-us", "Seven, nineteen, four hundred and two."),
)
PAUSE_S = 0.7
TARGET = Path(__file__).resolve().parent.parent / "tests" / "data" / "speech.npz"


def spoken(voice: str, text: str) -> np.ndarray:
    """One sentence, [samples] int16 at RATE."""
    command = ["espeak-ng", "-v", voice, "-s", "160", "--stdout", text]
    content = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(content)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    times = np.arange(int(len(samples) * RATE / rate)) / RATE
    return np.interp(times, np.arange(len(samples)) / rate, samples).astype(np.int16)


def main() -> None:
    """Write the file."""
    pause = np.zeros(int(PAUSE_S * RATE), dtype=np.int16)
    parts = [pause]
    for voice, text in SENTENCES:
        parts += [spoken(voice, text), pause]
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, samples=np.concatenate(parts), rate=RATE)
    print(f"{TARGET.name}: {len(np.concatenate(parts)) / RATE:.1f} s, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
