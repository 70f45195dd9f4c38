"""Write docs/configs.md: every key of a config with its type, its default and its comment, from the dataclasses.

python docs/configs.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.command_line.keys import page

PAGE = Path(__file__).with_suffix(".md")

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
