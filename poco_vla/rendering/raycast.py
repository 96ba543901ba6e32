"""Pictures of a MuJoCo scene without OpenGL: MuJoCo casts the rays, and OpenGL's lighting formula is evaluated here.

A coarse grid of rays is cast first, and a fine one only where the picture changes, so that even parts are nearly free.
Left out: shadows, reflections, sites, skins, tendons, textures other than on planes (elsewhere their mean colour), the
smoothing of meshes' normals, and cameras without perspective.
"""

# MuJoCo compiles its names from C and ships no stubs for them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

import mujoco
import numpy as np
from jaxtyping import Bool, Float, Int, Real, UInt8

STEP = 2  # pixels from one ray of the coarse grid to the next
CONTRAST = 0.12  # in the square root of brightness, as eyes see it: between rays further apart all pixels are cast
TEXELS = 256  # to which textures are blurred: a floor's lines must not be thinner than the coarse grid


class RayCaster:
    """Draws one model; holds what of its textures does not change from frame to frame."""

    def __init__(self, model: mujoco.MjModel, *, height: int, width: int) -> None:
        self.model, self.height, self.width = model, height, width
        material = model.geom_matid
        texture = np.where(material >= 0, model.mat_texid[material, 1], -1) if model.nmat else np.full(model.ngeom, -1)
        self._tiled = np.where(model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE, texture, -1)
        self._images = {int(i): _texture(model, int(i)) for i in np.unique(texture) if i >= 0}
        self._tint = np.ones((model.ngeom, 3), np.float32)
        for geom in np.flatnonzero((texture >= 0) & (self._tiled < 0)):
            self._tint[geom] = self._images[int(texture[geom])].mean(axis=(0, 1))
        self._roots, self._slack = _body_bounds(model)
        skies = np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX)
        sky = _texture(model, int(skies[0])) if len(skies) else np.zeros((6, 1, 3), np.float32)
        # Of the six faces, stacked downwards, the fifth is looked at; stars and the like are averaged away.
        self._sky = sky[4 * len(sky) // 6 : 5 * len(sky) // 6].mean(axis=1)

    def draw(
        self, data: mujoco.MjData, scene: mujoco.MjvScene, geomgroup: UInt8[np.ndarray, "6"]
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Draws the visible groups of geoms by the camera and the lights of `scene`, as `mjv_updateScene` left it."""
        rgba = self._colours()
        shown = (geomgroup[self.model.geom_group] > 0) & (rgba[:, 3] > 0)
        layers = [shown & (rgba[:, 3] == 1), shown & (rgba[:, 3] < 1)]  # of the translucent, the nearest is blended in

        def trace(pixels: Real[np.ndarray, "N 2"]) -> tuple[Float[np.ndarray, "N 3"], Int[np.ndarray, " N"]]:
            origin, rays = _rays(scene.camera, pixels / (self.height, self.width), self.width / self.height)
            colour, reached = self._background(rays), np.full(len(rays), np.inf)
            met = np.full(len(rays), -1)
            for layer in filter(np.any, layers):
                hit, geom, distance, normal = self._cast(data, origin, rays, layer, reached)
                point = origin + distance[:, None] * rays[hit]
                own = (rgba[geom, :3] * self._floor(data, geom, point)).astype(np.float32)
                shaded = self._shade(scene, geom, own, point, normal, rays[hit])
                opacity = 1 - (1 - rgba[geom, 3:]) ** 2  # a ray enters and leaves
                colour[hit] += opacity * (shaded - colour[hit])
                reached[hit], met[hit] = distance, geom
            return colour, met

        # Rays pass through the pixels' corners, so that each serves the four pixels that it averages into.
        last = 2 * STEP
        coarse = np.moveaxis(np.mgrid[0 : self.height + last : STEP, 0 : self.width + last : STEP], 0, -1)
        colours, met = trace(coarse.reshape(-1, 2))
        corners, uneven = _interpolate(colours.reshape(*coarse.shape[:2], 3), met.reshape(coarse.shape[:2]))
        uneven[::STEP, ::STEP] = False  # these have been cast
        corners[uneven] = trace(np.argwhere(uneven))[0]
        rows = (corners[:-1] + corners[1:])[: self.height]
        return (255 / 4 * (rows[:, :-1] + rows[:, 1:])[:, : self.width] + 0.5).astype(np.uint8)

    def _colours(self) -> Float[np.ndarray, "G 4"]:
        """Each geom's colour now: its own, unless that is the default and there is a material."""
        rgba, material = self.model.geom_rgba.copy(), self.model.geom_matid
        inherits = (material >= 0) & (rgba == np.array([0.5, 0.5, 0.5, 1], rgba.dtype)).all(axis=1)
        rgba[inherits] = self.model.mat_rgba[material[inherits]]
        rgba[:, :3] *= self._tint
        return rgba

    def _background(self, rays: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
        height = rays[:, 2] / np.abs(rays[:, :2]).max(axis=1).clip(1e-9)
        return self._sky[((1 - height.clip(-1, 1)) / 2 * (len(self._sky) - 1)).astype(int)]

    def _floor(
        self, data: mujoco.MjData, geom: Int[np.ndarray, " M"], point: Float[np.ndarray, "M 3"]
    ) -> Float[np.ndarray, "M 3"]:
        """The texture's colour where a plane was hit, white elsewhere."""
        colour = np.ones_like(point)
        for plane in np.flatnonzero(self._tiled >= 0):
            at, image = geom == plane, self._images[int(self._tiled[plane])]
            material, size = self.model.geom_matid[plane], self.model.geom_size[plane, :2]
            local = (point[at] - data.geom_xpos[plane]) @ data.geom_xmat[plane].reshape(3, 3)[:, :2]
            scale = 1 if self.model.mat_texuniform[material] else np.where(size > 0, size, 1)
            uv = (0.5 * local / scale * self.model.mat_texrepeat[material] + 0.5) % 1
            column, row = (uv * (image.shape[1], image.shape[0])).astype(int).T
            colour[at] = image[-1 - row, column]
        return colour

    def _cast(
        self,
        data: mujoco.MjData,
        origin: Float[np.ndarray, "3"],
        rays: Float[np.ndarray, "N 3"],
        among: Bool[np.ndarray, " G"],
        within: Float[np.ndarray, " N"],
    ) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"], Float[np.ndarray, " M"], Float[np.ndarray, "M 3"]]:
        """The rays that meet a geom `among` these nearer than `within`; for each the geom, the distance, the normal."""
        model, roots, only = self.model, self._roots, np.array([1, 0, 0, 0, 0, 0], np.uint8)
        geom, distance, normal = np.empty(len(rays), np.int32), np.empty(len(rays)), np.empty((len(rays), 3))
        args = model, data, origin.astype(float), rays.reshape(-1), only, 1, -1
        groups, halves = model.geom_group.copy(), model.bvh_aabb[roots, 3:]
        model.geom_group[:] = ~among  # MuJoCo selects geoms by group alone, so they are regrouped for the moment
        model.bvh_aabb[roots, 3:] += self._slack
        try:
            mujoco.mj_multiRay(*args, geom, distance, normal.reshape(-1), len(rays), mujoco.mjMAXVAL)
        finally:
            model.geom_group[:], model.bvh_aabb[roots, 3:] = groups, halves
        hit = np.flatnonzero((geom >= 0) & (distance < within))
        normal = normal[hit]
        normal *= -np.sign((normal * rays[hit]).sum(axis=1, keepdims=True))  # towards the viewer
        return hit, geom[hit], distance[hit], normal

    def _shade(
        self,
        scene: mujoco.MjvScene,
        geom: Int[np.ndarray, " M"],
        colour: Float[np.ndarray, "M 3"],
        point: Float[np.ndarray, "M 3"],
        normal: Float[np.ndarray, "M 3"],
        rays: Float[np.ndarray, "M 3"],
    ) -> Float[np.ndarray, "M 3"]:
        """OpenGL's formula: emitted, ambient, diffuse and specular light, summed over the lights."""
        emission, specular, shininess = self._surface(geom)
        received, gleam = np.repeat(emission, 3, axis=1), np.zeros_like(colour)
        for light in scene.lights[: scene.nlight]:
            directional = light.type == mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
            to_light = -light.dir[None] if directional else light.pos - point
            far = np.linalg.norm(to_light, axis=1, keepdims=True).clip(1e-9)
            to_light = to_light / far
            fade = 1.0 if directional else 1 / (far ** [0, 1, 2] @ light.attenuation)[:, None].clip(1e-9)
            if light.type == mujoco.mjtLightType.mjLIGHT_SPOT and light.cutoff <= 90:
                along = (to_light @ -light.dir)[:, None].clip(0)
                fade = fade * np.where(along >= np.cos(np.radians(light.cutoff)), along**light.exponent, 0)
            facing = (normal * to_light).sum(axis=1, keepdims=True).clip(0)
            half = to_light - rays
            half /= np.linalg.norm(half, axis=1, keepdims=True).clip(1e-9)
            mirrored = (normal * half).sum(axis=1, keepdims=True).clip(0) ** shininess * (facing > 0)
            received += fade * (light.ambient + facing * light.diffuse)
            gleam += fade * specular * mirrored * light.specular
        return (colour * received + gleam).clip(0, 1)

    def _surface(self, geom: Int[np.ndarray, " M"]) -> list[Float[np.ndarray, "M 1"]]:
        """Emission, specular strength and OpenGL's exponent of shininess, with MuJoCo's defaults without a material."""
        model = self.model
        material = model.geom_matid[geom]  # -1, which is none, finds the default appended last
        fields = (model.mat_emission, 0), (model.mat_specular, 0.5), (128 * model.mat_shininess, 64)
        surface = [np.append(values, default).astype(np.float32)[material][:, None] for values, default in fields]
        surface[1][model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_PLANE] = 0  # OpenGL lights a plane's corners only
        return surface


def _texture(model: mujoco.MjModel, index: int) -> Float[np.ndarray, "h w 3"]:
    height, width, start = model.tex_height[index], model.tex_width[index], model.tex_adr[index]
    channels, block = model.tex_nchannel[index], max(1, width // TEXELS)
    image = model.tex_data[start : start + height * width * channels].reshape(height, width, channels)
    image = image[: height // block * block, : width // block * block]
    means = image.reshape(height // block, block, width // block, block, channels).mean(axis=(1, 3), dtype=np.float32)
    return np.broadcast_to(means[..., :3] / 255, (*means.shape[:2], 3))


def _interpolate(
    grid: Float[np.ndarray, "h w 3"], met: Int[np.ndarray, "h w"]
) -> tuple[Float[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]:
    """The grid's colours spread linearly over all pixels, and which lie in cells too uneven for that.

    Args:
        met: the geom that each ray of the grid met; a cell with several is uneven whatever their colours.
    """
    spread = [np.ptp([a[:-1, :-1], a[:-1, 1:], a[1:, :-1], a[1:, 1:]], axis=0) for a in (np.sqrt(grid), met)]
    uneven = (spread[0] > CONTRAST).any(axis=-1) | (spread[1] > 0)
    for axis in (0, 1):
        low, high = np.delete(grid, -1, axis), np.delete(grid, 0, axis)
        between = np.stack([low + (high - low) * k / STEP for k in range(STEP)], axis=axis + 1)
        grid = between.reshape(*grid.shape[:axis], -1, *grid.shape[axis + 1 :])
    return grid, uneven.repeat(STEP, axis=0).repeat(STEP, axis=1)


def _rays(
    eyes: Sequence[mujoco.MjvGLCamera], at: Real[np.ndarray, "N 2"], aspect: float
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "N 3"]]:
    """Return where the view's rays start (between MuJoCo's two stereo eyes) and their unit directions.

    Args:
        at: rows and columns as fractions of the picture's height and width.
    """
    forward, up = eyes[0].forward.astype(float), eyes[0].up.astype(float)
    y, x = (1 - 2 * at[:, :1]), (2 * at[:, 1:] - 1) * aspect
    rays = forward + eyes[0].frustum_top / eyes[0].frustum_near * (y * up + x * np.cross(forward, up))
    return (eyes[0].pos + eyes[1].pos) / 2.0, rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _body_bounds(model: mujoco.MjModel) -> tuple[Int[np.ndarray, " R"], Float[np.ndarray, "R 1"]]:
    """The roots of the bodies' bounding volumes and by how much each must grow to hold its visual geoms as well.

    MuJoCo fits them to the geoms that collide, and `mj_multiRay` (unlike `mj_ray`) skips bodies by them.
    """
    geom = np.flatnonzero(model.body_bvhadr[model.geom_bodyid] >= 0)
    body = model.geom_bodyid[geom]
    root = model.body_bvhadr[body]
    radius = np.where(model.geom_rbound > 0, model.geom_rbound, 1e3)[geom]  # a plane's is given as 0
    offset = np.linalg.norm(model.geom_pos[geom] - model.body_ipos[body], axis=1)
    centre, half = np.linalg.norm(model.bvh_aabb[root].reshape(-1, 2, 3), axis=-1).T
    slack = np.zeros(model.nbvh)
    np.maximum.at(slack, root, centre + offset + radius - half)
    roots = np.unique(root)
    return roots, slack[roots, None]
