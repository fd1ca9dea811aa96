"""The dashboard: one page and its assets, read from the same API that clients call."""

from app.web.pages import CONTENT_SECURITY_POLICY, build_router

__all__ = ["CONTENT_SECURITY_POLICY", "build_router"]
