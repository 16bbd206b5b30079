"""`python -m mixflow.config --write-schema` writes the schema file anew."""

import sys
from pathlib import Path

from mixflow.config.schema import SCHEMA_FILE, schema_text

if __name__ == "__main__":
    if sys.argv[1:] != ["--write-schema"]:
        sys.exit("usage: python -m mixflow.config --write-schema")
    Path(SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
