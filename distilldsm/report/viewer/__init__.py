"""Volumes with their masks in the browser: a self-contained piece of HTML, drawn by NiiVue, which is package data."""

from distilldsm.report.viewer.fragment import ViewedCase, viewer_contents, viewer_fragment, viewer_page
from distilldsm.report.viewer.packing import packed

__all__ = ["ViewedCase", "packed", "viewer_contents", "viewer_fragment", "viewer_page"]
