"""The picture of a run: files of a run's or a demo's folder in; one self-contained HTML page out."""
