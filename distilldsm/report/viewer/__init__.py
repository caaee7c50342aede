"""Show volumes and masks in the browser: self-contained HTML, drawn by NiiVue (included in this package)."""

from distilldsm.report.viewer.fragment import ViewedCase, viewer_contents, viewer_fragment, viewer_page
from distilldsm.report.viewer.packing import packed

__all__ = ["ViewedCase", "packed", "viewer_contents", "viewer_fragment", "viewer_page"]
