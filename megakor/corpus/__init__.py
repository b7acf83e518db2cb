"""Raw text in, clean documents out: reading, normal form, even sampling, the held-out split, the packaged sample."""

from __future__ import annotations
