"""Scripted experts for Lift, Can and Square: proportional control towards a goal that is chosen anew at every step.

Nothing is remembered between steps but the noise, so that an expert goes on from wherever a disturbance has left the
robot and the object. It reads the poses of bodies, as the observed state has them, and no contacts or forces.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from poco_vla.simulators.robosuite_gym import RobosuiteEnv

OPEN, CLOSE = -1.0, 1.0
_NEUTRAL = np.pi / 2
"""Yaw of the axis along which the fingers close, at the start of an episode; the arm turns furthest from there."""
_NOISE_MEMORY = 0.8
"""Correlation of the noise from one step to the next, so that it pushes rather than shakes."""

Vector = Float[np.ndarray, "3"]
Rotation = Float[np.ndarray, "3 3"]


@dataclass(frozen=True)
class Scene:
    """What an expert looks at; metres, world frame.

    Attributes:
        hand: point between the fingertips.
        hand_rotation: columns: the axis along which the fingers close, the one across, and where the fingers point.
        opening: distance between the fingers.
        thing: the object's centre.
        thing_rotation: its columns in the world.
    """

    hand: Vector
    hand_rotation: Rotation
    opening: float
    thing: Vector
    thing_rotation: Rotation


@dataclass(frozen=True)
class Goal:
    """Where the hand shall go: displacement in metres, rotation as an axis times an angle in radians, and its grip."""

    move: Vector
    turn: Vector
    grip: float


@dataclass(frozen=True)
class Style:
    """How one episode is done, drawn once, so that demonstrations differ.

    Attributes:
        height: metres above the object from which the hand descends.
        speed: largest action along an axis.
        along, above: where the object is grasped, metres off its centre: across the closing axis, and upwards.
        yaw: radians by which a round object's grasp is turned.
    """

    height: float
    speed: float
    along: float
    above: float
    yaw: float

    @staticmethod
    def draw(rng: np.random.Generator) -> "Style":
        return Style(
            height=rng.uniform(0.04, 0.1),
            speed=rng.uniform(0.7, 1.0),
            along=rng.uniform(-0.006, 0.006),
            above=rng.uniform(-0.004, 0.006),
            yaw=rng.uniform(-0.4, 0.4),
        )


class Expert:
    """Acts on the environment's current state.

    Args:
        env: the environment; only read.
        noise: standard deviation of what is added to an action's six displacements, correlated in time; 0.1 is mild.
        rng: draws the episode's style and the noise.
    """

    body: str
    width: float
    """Between the fingers when the object is held, in metres."""
    tall: float = 0.0
    """How far the object stands up beside the fingertips when it is grasped, in metres."""

    def __init__(self, env: "RobosuiteEnv", noise: float, rng: np.random.Generator) -> None:
        self._env, self._noise, self._rng = env, noise, rng
        self._site = env.simulator.robots[0].eef_site_id["right"]
        self.style = Style.draw(rng)
        self._drift = np.zeros(6)

    def action(self) -> np.ndarray | None:
        """The next action [7] float32 in [-1, 1]; never None, as there is no plan that could come to its end."""
        goal = self.goal(self._scene())
        # Gains: the controller moves a fifth of what it is asked for in a step; these stop it in time.
        wanted = np.concatenate([goal.move / 0.025, goal.turn / 0.25])
        self._drift *= _NOISE_MEMORY
        self._drift += self._rng.normal(0.0, self._noise * np.sqrt(1 - _NOISE_MEMORY**2), 6)
        motion = np.clip(wanted, -self.style.speed, self.style.speed) + self._drift
        return np.append(np.clip(motion, -1.0, 1.0), goal.grip).astype(np.float32)

    def goal(self, scene: Scene) -> Goal:
        """Return what to do in this state."""
        raise NotImplementedError

    def reach(self, scene: Scene, point: Vector, yaw: float) -> Goal:
        """Towards a grasp of `point` with the fingers closing along `yaw`, from above, and the grasp itself."""
        offset, turn = point - scene.hand, rotation_between(scene.hand_rotation, downwards(yaw))
        aside = float(np.hypot(*offset[:2])) + 0.05 * float(np.linalg.norm(turn))
        closing = scene.opening < 0.07
        empty = scene.opening < self.width - 0.005
        if not empty and self.around(scene, point, slack=2.0 if closing else 1.2):
            return Goal(offset, turn, CLOSE)
        above = self.style.height + self.tall
        height = float(np.clip(2 * (aside - 0.008), 0.0, above))
        if closing and aside < 0.06:  # open above the object, not onto it
            height = above
        return Goal(offset + np.array([0, 0, height]), turn, OPEN)

    def around(self, scene: Scene, point: Vector, *, slack: float) -> bool:
        """Return True if `point` is between the fingertips."""
        offset = np.abs(point - scene.hand)
        return bool(np.hypot(*offset[:2]) < 0.008 * slack and offset[2] < 0.008 * slack)

    def holds(self, scene: Scene, point: Vector) -> bool:
        """Return True if the object is between the fingertips and keeps them apart."""
        return abs(scene.opening - self.width) < 0.005 and self.around(scene, point, slack=2.5)

    def _scene(self) -> Scene:
        data = self._env.data
        fingers = self._env.simulator.robots[0]._ref_gripper_joint_pos_indexes["right"]
        thing = data.body(self.body)
        return Scene(
            hand=data.site_xpos[self._site].copy(),
            hand_rotation=data.site_xmat[self._site].reshape(3, 3).copy(),
            opening=float(np.abs(data.qpos[fingers]).sum()),
            thing=thing.xpos.copy(),
            thing_rotation=thing.xmat.reshape(3, 3).copy(),
        )


class LiftExpert(Expert):
    """Grasps the cube by two faces and lifts it."""

    body = "cube_main"
    width = 0.042

    def goal(self, scene: Scene) -> Goal:
        level = scene.thing_rotation[:, np.argmin(np.abs(scene.thing_rotation[2]))]  # it may lie on another face
        yaw = nearest_yaw(yaw_of(level), np.pi / 2, scene)
        point = scene.thing + self.style.along * axis_across(yaw) + [0, 0, self.style.above]
        if self.holds(scene, point):
            return Goal(np.array([0, 0, self.style.height]), np.zeros(3), CLOSE)
        return self.reach(scene, point, yaw)


class CanExpert(Expert):
    """Grasps the can, carries it over the walls into its bin, lets go and rises: success needs the hand off the can."""

    body = "Can_main"
    width = 0.05
    tall = 0.04
    target = np.array([0.165, 0.355, 0.88])
    """In the can's quarter of the bin where the arm reaches, so low that the can does not tip over."""
    quarter = np.array([[0.12, 0.3], [0.27, 0.5]])
    """Corners of that quarter, less the can's radius."""
    clear = 0.97
    """Height of the can's centre at which it passes over the walls, whose tops are at 0.9."""

    def goal(self, scene: Scene) -> Goal:
        upright = abs(scene.thing_rotation[2, 2]) > 0.9
        yaw = _NEUTRAL + self.style.yaw
        if not upright:
            yaw = nearest_yaw(yaw_of(scene.thing_rotation[:, 2]) + np.pi / 2, np.pi, scene)
        point = scene.thing + self.style.along * axis_across(yaw) + [0, 0, self.style.above + 0.01 * upright]
        turn = rotation_between(scene.hand_rotation, downwards(yaw))
        missing = self.target - scene.thing
        aside = float(np.hypot(*missing[:2]))
        low, high = self.quarter
        if scene.thing[2] < 0.9 and (low < scene.thing[:2]).all() and (scene.thing[:2] < high).all():
            return Goal(np.array([0, 0, self.style.height]) * (scene.opening > self.width + 0.005), turn, OPEN)
        if not self.holds(scene, point):
            return self.reach(scene, point, yaw)
        return Goal(self.carry(scene, missing, aside), turn, CLOSE)

    def carry(self, scene: Scene, missing: Vector, aside: float) -> Vector:
        """Up, across, down."""
        up = self.clear + self.style.height / 2 - scene.thing[2]
        if scene.thing[2] < self.clear - 0.02 and aside > 0.05:
            return np.array([0, 0, up])
        return np.append(missing[:2], missing[2] if aside < 0.025 else up)


class SquareExpert(Expert):
    """Grasps the nut by its handle, aligns its hole with the peg high above it, and lowers it."""

    body = "SquareNut_main"
    width = 0.032
    handle = 0.064
    """Metres from the nut's centre, along its own x axis; success needs the hand 4.2 cm away from the centre."""
    peg = np.array([0.23, 0.1])
    clear = 0.98
    """Height of the nut above the peg, whose top is at 0.95."""

    def goal(self, scene: Scene) -> Goal:
        yaw = nearest_yaw(yaw_of(scene.thing_rotation[:, 1]), np.pi, scene)
        reach = self.handle + self.style.along / 2
        point = scene.thing + reach * scene.thing_rotation[:, 0] + [0, 0, 0.004]
        if not self.holds(scene, point):
            return self.reach(scene, point, yaw)
        return self.fit(scene)

    def fit(self, scene: Scene) -> Goal:
        """The nut level, square to the peg and above it; then down."""
        turn = rotation_between(scene.thing_rotation, self.square_to_peg(scene))
        missing = self.peg - scene.thing[:2]
        aside, askew = float(np.hypot(*missing)), float(np.linalg.norm(turn))
        height = scene.thing[2]
        if height < self.clear - 0.02 and aside > 0.012:
            return Goal(np.array([0, 0, self.clear + 0.02 - height]), np.zeros(3), CLOSE)
        fits = aside < 0.005 and askew < 0.12
        down = -0.03 if fits or height < self.clear - 0.03 else self.clear - height
        return Goal(np.append(missing, down), turn, CLOSE)

    def square_to_peg(self, scene: Scene) -> Rotation:
        """The nut's rotation: level, and of the yaws that fit the one nearest to the present.

        Not the one at which the handle points away from the robot: beyond the peg the arm does not reach.
        """
        yaw = yaw_of(scene.thing_rotation[:, 0])
        quarter = (round(yaw / (np.pi / 2)) or np.copysign(1, yaw)) * np.pi / 2
        x, y = [np.cos(quarter), np.sin(quarter), 0.0], [-np.sin(quarter), np.cos(quarter), 0.0]
        return np.column_stack([x, y, [0.0, 0.0, 1.0]])


EXPERTS: dict[str, type[Expert]] = {"Lift": LiftExpert, "Can": CanExpert, "Square": SquareExpert}


def make_expert(env: "RobosuiteEnv", noise: float, rng: np.random.Generator) -> Expert:
    """The expert of the environment's task."""
    return EXPERTS[env.task](env, noise, rng)


def downwards(yaw: float) -> Rotation:
    """The hand's rotation when the fingers point down and close along the horizontal axis at `yaw`."""
    return np.column_stack([[np.cos(yaw), np.sin(yaw), 0.0], axis_across(yaw), [0.0, 0.0, -1.0]])


def axis_across(yaw: float) -> Vector:
    """Horizontal axis across the one along which the fingers close."""
    return np.array([np.sin(yaw), -np.cos(yaw), 0.0])


def yaw_of(axis: Vector) -> float:
    return float(np.arctan2(axis[1], axis[0]))


def nearest_yaw(yaw: float, period: float, scene: Scene) -> float:
    """Return `yaw` or its equal by symmetry, whichever is easy for the arm rather than far from where it is."""
    around = yaw + period * np.arange(round(2 * np.pi / period))
    now = yaw_of(scene.hand_rotation[:, 0])
    return float(around[np.argmin(np.abs(wrapped(around - _NEUTRAL)) + 0.3 * np.abs(wrapped(around - now)))])


def wrapped(angle: Float[np.ndarray, "*N"]) -> Float[np.ndarray, "*N"]:
    """The same angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def rotation_between(now: Rotation, wanted: Rotation) -> Vector:
    """Axis times sine of the angle of the rotation from one to the other, in the world frame."""
    return 0.5 * np.cross(now, wanted, axis=0).sum(axis=1)
