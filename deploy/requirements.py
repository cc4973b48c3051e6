"""Print what the project and the named extras of it need: `requirements.py cpu`.

An image installs these in a layer of their own, before the code, so that a change to the code doesn't install them
again.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
unknown = [name for name in sys.argv[1:] if name not in extras]
if unknown:
    sys.exit(f"no extra called {', '.join(unknown)}; there are {', '.join(extras)}")
print(*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
