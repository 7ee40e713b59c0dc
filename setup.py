"""The only build logic: the version, written once in growkit/__init__.py. GROWKIT_LOCAL_VERSION=x makes it `+x`."""

import os
import re
from pathlib import Path

from setuptools import setup

version = re.search(r'^__version__ = "([^"]+)"', Path("growkit/__init__.py").read_text(), re.MULTILINE)[1]
local = os.environ.get("GROWKIT_LOCAL_VERSION")
setup(version=f"{version}+{local}" if local else version)
