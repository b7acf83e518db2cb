#!/bin/sh
# Installs megakor, in the versions that it is tested with, into the Python that is first on PATH.
# The container's recipe runs this, and so does the test of that recipe.
set -eu
cd "$(dirname "$0")/.."
python -m pip install --constraint constraints.txt torch
python -m pip install --constraint constraints.txt '.[s3]'
