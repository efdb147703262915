"""Version of Packhorse, from the installed package."""

from importlib.metadata import version

VERSION = version("packhorse")
