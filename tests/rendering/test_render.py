import logging

import gymnasium as gym
import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco")

from poco_vla.rendering import render as module  # noqa: E402
from poco_vla.rendering.render import SceneRenderer, render  # noqa: E402

XML = """
<mujoco>
  <asset>
    <texture name="floor" type="2d" builtin="checker" rgb1=".2 .2 .2" rgb2=".4 .4 .4" width="64" height="64"/>
    <texture name="sky" type="skybox" builtin="gradient" rgb1=".5 .6 .7" rgb2="1 1 1" width="64" height="384"/>
    <material name="floor" texture="floor" texuniform="true"/>
  </asset>
  <worldbody>
    <light pos="0 0 2" dir="0 0 -1"/>
    <camera name="front" pos="1.5 0 1" xyaxes="0 1 0 -.55 0 .83"/>
    <geom type="plane" size="1 1 .1" material="floor"/>
    <geom type="sphere" size=".1" pos="-.3 -.4 .1" rgba="0 0 1 .0"/>
    <geom name="target" type="box" size=".06 .06 .06" pos="0 .4 .06" rgba="0 1 0 .2"/>
    <body name="cube" pos="0 0 .06"><freejoint/><geom type="box" size=".06 .06 .06" rgba="1 0 0 1"/></body>
  </worldbody>
</mujoco>
"""


class Scene(gym.Env):
    """What `render` asks of an environment: a MuJoCo model and its data."""

    def __init__(self, xml=XML):
        self._model = mujoco.MjModel.from_xml_string(xml)
        self._data = mujoco.MjData(self._model)
        mujoco.mj_forward(self._model, self._data)

    def put_cube(self, x, y):
        self._data.qpos[:3] = x, y, 0.06
        mujoco.mj_forward(self._model, self._data)


@pytest.fixture(params=["rays", "opengl"])
def scene(request, monkeypatch):
    """A scene under each renderer; OpenGL is skipped where the machine has none."""
    if request.param == "opengl" and module.opengl_context() is None:
        pytest.skip("no OpenGL on this machine")
    if request.param == "rays":
        monkeypatch.setattr(module, "opengl_context", lambda: None)
    return Scene()


def pixel(scene, point, height=240, width=320):
    """Row and column of a point in the world, by the pinhole formula of the model's camera."""
    x, y, z = scene._data.cam("front").xmat.reshape(3, 3).T @ (np.asarray(point) - scene._data.cam("front").xpos)
    focal = height / 2 / np.tan(np.radians(scene._model.cam_fovy[0]) / 2)
    return round(height / 2 + focal * y / z), round(width / 2 - focal * x / z)


def is_red(image):
    return (image[..., 0] > 60) & (image[..., 0] > 2 * image[..., 1].astype(int))


@pytest.mark.parametrize(("height", "width"), [(240, 320), (65, 97), (1, 1)])
def test_picture_has_the_asked_shape(scene, height, width):
    image = render(scene, height=height, width=width)
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8


def test_cube_appears_where_it_projects_to(scene):
    for x, y in ((0, 0), (0.2, -0.3), (-0.4, 0.2)):
        scene.put_cube(x, y)
        red = np.argwhere(is_red(render(scene)))
        assert is_red(render(scene))[pixel(scene, (x, y, 0.06))]
        assert np.abs(red.mean(axis=0) - pixel(scene, (x, y, 0.06))).max() < 6


def test_moving_the_cube_moves_only_its_pixels(scene):
    before = render(scene)
    scene.put_cube(0, -0.3)
    changed = (render(scene) != before).any(axis=-1)
    assert 0.002 < changed.mean() < 0.1


def test_translucent_geom_tints_and_invisible_one_does_not(scene):
    image = render(scene).astype(int)
    row, column = pixel(scene, (0, 0.4, 0.06))
    assert image[row, column, 1] > image[row, column, 0] + 15
    assert (image[..., 2] < image[..., 0] + 90).all()


def test_two_renderers_agree():
    if module.opengl_context() is None:
        pytest.skip("no OpenGL on this machine")
    scene = Scene()
    opengl, rays = (SceneRenderer(scene._model, backend=b).render(scene._data).astype(int) for b in ("auto", "rays"))
    assert np.abs(opengl - rays).mean() < 12


def test_visual_geom_beyond_what_collides_is_seen():
    """`mj_multiRay` alone skips it: MuJoCo bounds the body by its colliding geom, a speck at the origin."""
    xml = """
    <mujoco><worldbody><body>
      <geom size=".01"/><geom type="box" pos="0 0 .5" size=".2 .2 .2" rgba="1 0 0 1" contype="0" conaffinity="0"/>
    </body></worldbody></mujoco>"""
    scene = Scene(xml)
    assert is_red(SceneRenderer(scene._model, backend="rays").render(scene._data)).mean() > 0.05


def test_model_without_colliding_geoms_is_seen():
    xml = '<mujoco><worldbody><geom size=".2" rgba="1 0 0 1" contype="0" conaffinity="0"/></worldbody></mujoco>'
    scene = Scene(xml)
    assert is_red(SceneRenderer(scene._model, backend="rays").render(scene._data)).mean() > 0.05


def test_casting_rays_leaves_the_model_as_it_was():
    scene = Scene()
    groups, bounds = scene._model.geom_group.copy(), scene._model.bvh_aabb.copy()
    SceneRenderer(scene._model, backend="rays").render(scene._data)
    np.testing.assert_array_equal(scene._model.geom_group, groups)
    np.testing.assert_array_equal(scene._model.bvh_aabb, bounds)


def test_missing_opengl_is_said_once(monkeypatch, caplog):
    def missing(backend):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(module, "_open_context", missing)
    module.opengl_context.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger=module.__name__):
            for _ in range(2):
                assert np.ptp(render(Scene())) > 50
    finally:
        module.opengl_context.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "libegl1" in caplog.text


def test_opengl_that_fails_later_is_replaced(monkeypatch, caplog):
    class Broken:
        def make_current(self):
            raise RuntimeError("context lost")

    monkeypatch.setattr(module, "opengl_context", Broken)
    scene = Scene()
    for _ in range(2):
        assert np.ptp(render(scene)) > 50
    assert caplog.text.count("context lost") == 1


def test_one_renderer_per_environment_and_none_after_it(monkeypatch):
    monkeypatch.setattr(module, "opengl_context", lambda: None)
    scene, known = Scene(), len(module._renderers)
    render(scene)
    first = module._renderers[scene][240, 320]
    render(scene, height=32, width=32)  # what a policy sees beside what a video shows
    render(scene, camera="front")
    assert module._renderers[scene][240, 320] is first
    assert len(module._renderers[scene]) == 2
    del scene
    assert len(module._renderers) == known


def test_renderers_of_several_sizes_do_not_draw_into_each_others_pictures(scene):
    """They share one OpenGL context, and with it the framebuffer that is drawn to."""
    sizes = [(64, 64), (128, 96)]
    alone = [render(Scene(), height=h, width=w) for h, w in sizes]
    for _ in range(2):
        for (h, w), expected in zip(sizes, alone, strict=True):
            np.testing.assert_array_equal(render(scene, height=h, width=w), expected)


def test_environment_that_is_no_mujoco_scene_draws_itself():
    class Flat(gym.Env):
        def render(self):
            return np.full((2, 2, 3), 7, np.uint8)

    assert (render(Flat()) == 7).all()


def test_unknown_camera_lists_the_known():
    with pytest.raises(ValueError, match=r'no camera "side"\. The model has: front'):
        render(Scene(), camera="side")


@pytest.mark.parametrize(
    ("setting", "backends"),
    [("egl", ("egl",)), ("OSMesa", ("osmesa",)), ("disable", ()), ("", ("egl", "osmesa"))],
)
def test_mujoco_gl_is_honoured(monkeypatch, setting, backends):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("MUJOCO_GL", setting)
    assert module.opengl_backends() == backends


def test_ogbench_cube_is_seen(monkeypatch):
    pytest.importorskip("ogbench")
    monkeypatch.setattr(module, "opengl_context", lambda: None)
    env = gym.make("cube-single-singletask-v0")
    env.reset(seed=0)
    scene = env.unwrapped
    assert is_red(render(env))[pixel(scene, scene._data.joint("object_joint_0").qpos[:3])]
    env.close()
