"""Pictures of MuJoCo scenes on any machine: by MuJoCo's OpenGL, or by casting rays on the CPU where OpenGL is missing.

`MUJOCO_GL` is MuJoCo's own setting: `egl`, `osmesa` or `glfw` choose an OpenGL backend, `disable` casts rays; unset,
`egl` and then `osmesa` are tried. MuJoCo is an optional extra, so it is only imported once a scene is to be drawn.
"""

# MuJoCo compiles its names from C and ships no stubs for them.
# pyright: reportAttributeAccessIssue=false

import atexit
import contextlib
import functools
import importlib
import logging
import os
import platform
import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    import mujoco

    from poco_vla.rendering.raycast import RayCaster

logger = logging.getLogger(__name__)

HELP = "for the faster OpenGL: apt install libegl1 libegl-mesa0 libgl1-mesa-dri, then MUJOCO_GL=egl or unset"


def render(
    env: gym.Env, *, height: int = 240, width: int = 320, camera: "str | int | mujoco.MjvCamera | None" = None
) -> UInt8[np.ndarray, "H W 3"]:
    """The environment's current picture; `env.render()` where the environment is not a MuJoCo scene.

    Args:
        camera: a camera's name, its index or a `MjvCamera`; None is the one called "front", else MuJoCo's free camera.
    """
    base = env.unwrapped
    model = getattr(base, "_model", None) or getattr(base, "model", None)
    data = getattr(base, "_data", None) or getattr(base, "data", None)
    mujoco = sys.modules.get("mujoco")
    if mujoco is None or not isinstance(model, mujoco.MjModel) or not isinstance(data, mujoco.MjData):
        return np.asarray(env.render())
    renderers = _renderers.setdefault(base, {})
    renderer = renderers.get((height, width))
    if renderer is None or renderer.model is not model:
        renderers[height, width] = renderer = SceneRenderer(model, height=height, width=width)
    return renderer.render(data, camera)


class SceneRenderer:
    """Draws one model. `backend` "auto" takes OpenGL where it works, "rays" always casts rays."""

    _mjr: "mujoco.MjrContext | None" = None

    def __init__(self, model: "mujoco.MjModel", *, height: int = 240, width: int = 320, backend: str = "auto") -> None:
        import mujoco

        if backend not in ("auto", "rays"):
            raise ValueError(f'no backend named "{backend}". Choose from: auto, rays.')
        self.model, self.height, self.width = model, height, width
        self._option = mujoco.MjvOption()
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._gl_context: Any = opengl_context() if backend == "auto" else None
        self._caster: RayCaster | None = None
        _alive.add(self)

    def render(
        self, data: "mujoco.MjData", camera: "str | int | mujoco.MjvCamera | None" = None
    ) -> UInt8[np.ndarray, "H W 3"]:
        import mujoco

        view, everything = self._camera(camera), mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self.model, data, self._option, None, view, everything, self._scene)
        if self._gl_context is not None:
            try:
                return self._render_opengl()
            except Exception as error:  # drivers raise anything, and a picture is not worth a training run
                self._gl_context = self._mjr = None
                logger.warning("OpenGL failed (%s); rendering by ray casting from here on.", error)
        if self._caster is None:
            from poco_vla.rendering.raycast import RayCaster

            self._caster = RayCaster(self.model, height=self.height, width=self.width)
        return self._caster.draw(data, self._scene, self._option.geomgroup)

    def close(self) -> None:
        """Frees what OpenGL holds for this renderer; the next picture allocates it anew."""
        if self._mjr is not None and self._gl_context is not None:
            self._gl_context.make_current()
            self._mjr.free()
        self._mjr = None

    __del__ = close

    def _camera(self, camera: "str | int | mujoco.MjvCamera | None") -> "mujoco.MjvCamera":
        import mujoco

        if isinstance(camera, mujoco.MjvCamera):
            return camera
        names = [self.model.camera(i).name for i in range(self.model.ncam)]
        view = mujoco.MjvCamera()
        if camera is None and "front" not in names:
            mujoco.mjv_defaultFreeCamera(self.model, view)
            return view
        wanted = "front" if camera is None else camera
        if wanted not in names and wanted not in range(len(names)):
            raise ValueError(f'no camera "{camera}". The model has: {", ".join(names) or "none"}.')
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = names.index(wanted) if isinstance(wanted, str) else wanted
        return view

    def _render_opengl(self) -> UInt8[np.ndarray, "H W 3"]:
        import mujoco

        assert self._gl_context is not None
        self._gl_context.make_current()  # an environment's own renderer may have made another one current
        if self._mjr is None:
            _forget_gl_errors()
            self._mjr = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
            mujoco.mjr_resizeOffscreen(self.width, self.height, self._mjr)
        # Every time: renderers share one context, and which framebuffer is drawn to is the context's state.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        image, frame = np.empty((self.height, self.width, 3), np.uint8), mujoco.MjrRect(0, 0, self.width, self.height)
        mujoco.mjr_render(frame, self._scene, self._mjr)
        mujoco.mjr_readPixels(image, None, frame, self._mjr)
        return image[::-1].copy()


_renderers: weakref.WeakKeyDictionary[gym.Env, dict[tuple[int, int], SceneRenderer]] = weakref.WeakKeyDictionary()
"""Of each environment one per size of picture; all its cameras share it."""
_alive: weakref.WeakSet[SceneRenderer] = weakref.WeakSet()


@functools.cache
def opengl_context() -> Any:
    """The process's one OpenGL context, or None where none can be made; which of the two is logged, once."""
    if not (backends := opengl_backends()):
        logger.info("Rendering by ray casting on the CPU, as MUJOCO_GL=%s asks.", os.environ["MUJOCO_GL"])
        return None
    for backend in backends:
        try:
            context = _open_context(backend)
        except Exception as error:  # a missing library shows up as anything from ImportError to AttributeError
            logger.debug("OpenGL by %s: %r", backend, error)
            continue
        logger.info("Rendering by OpenGL (%s).", backend)
        atexit.register(_close_all, context)
        return context
    logger.warning("No OpenGL here: rendering by ray casting on the CPU; %s.", HELP)
    return None


def opengl_backends() -> tuple[str, ...]:
    """The modules of `mujoco` to take a GL context from, in order, given MUJOCO_GL and the platform."""
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    if wanted in ("disable", "disabled", "off", "false", "0"):
        return ()
    if wanted in ("egl", "osmesa", "glfw"):
        return (wanted,)
    return {"Linux": ("egl", "osmesa"), "Darwin": ("cgl",)}.get(platform.system(), ("glfw",))


def _open_context(backend: str) -> Any:
    """A working context. MuJoCo's `Renderer` is by-passed: its backend is settled by whoever imports it first."""
    import mujoco

    asked = os.environ.get("PYOPENGL_PLATFORM")
    try:
        with warnings.catch_warnings(action="ignore"):
            module = importlib.import_module(f"mujoco.{backend}")
            # MuJoCo's destructors read `_context`, which a constructor that raises has not set.
            context = type("GLContext", (module.GLContext,), {"_context": None})(64, 64)
            context.make_current()
            mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100.value)
    except Exception:
        if asked is None:  # importing a backend ties PyOpenGL to it; the next one must find PyOpenGL as we did
            os.environ.pop("PYOPENGL_PLATFORM", None)
            for name in [n for n in sys.modules if n.split(".")[0] == "OpenGL" or n.startswith(f"mujoco.{backend}")]:
                del sys.modules[name]
        raise
    return context


def _forget_gl_errors() -> None:
    """MuJoCo blames a new context for what freeing an older one left behind in the driver, and prints it."""
    with contextlib.suppress(ImportError):
        from OpenGL.GL import glGetError

        while glGetError():
            pass


def _close_all(context: Any) -> None:
    """At exit, while the driver is still there to be told."""
    for renderer in _alive:
        renderer.close()
    context.free()
