"""The demo: Retain's main job from end to end, as a client sees it."""
