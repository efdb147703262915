"""The version of Packhorse, as pyproject.toml says it."""

from importlib.metadata import version

VERSION = version("packhorse")
