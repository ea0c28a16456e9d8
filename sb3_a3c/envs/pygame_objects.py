"""How pygame's objects, which an environment has once it was rendered, are pickled: surfaces with their pixels."""

import os
import sys
from typing import Any


def reduce_pygame(obj: Any) -> tuple[Any, ...] | None:
    """How to make a surface, a window or a clock again, for a pickler; None for all else."""
    pygame: Any = sys.modules.get("pygame")
    if pygame is None:
        return None
    if type(obj) is pygame.time.Clock:
        return _clock, ()
    if type(obj) is not pygame.Surface:
        return None
    if obj is pygame.display.get_surface():
        return _window, (obj.get_size(),)
    if (parent := obj.get_parent()) is not None:  # what is drawn on one is on the other
        return _part_of_surface, (parent, (obj.get_offset(), obj.get_size()))
    transparent = obj.get_flags() & pygame.SRCALPHA or obj.get_colorkey() is not None
    mode = "RGBA" if transparent else "RGBX"
    return _surface, (pygame.image.tobytes(obj, mode), obj.get_size(), mode, obj.get_alpha())


def _pygame() -> Any:
    """The module, without the greeting that the main process has printed, and without sound."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "hide")
    import pygame

    pygame.font.init()  # environments that have a surface or a window take the rest for initialized
    return pygame


def _clock() -> Any:
    return _pygame().time.Clock()


def _window(size: tuple[int, int]) -> Any:
    pygame = _pygame()
    pygame.display.init()
    return pygame.display.set_mode(size)


def _part_of_surface(surface: Any, area: Any) -> Any:
    return surface.subsurface(area)


def _surface(pixels: bytes, size: tuple[int, int], mode: str, alpha: int | None) -> Any:
    surface = _pygame().image.frombytes(pixels, size, mode)
    if alpha is not None:
        surface.set_alpha(alpha)
    return surface
