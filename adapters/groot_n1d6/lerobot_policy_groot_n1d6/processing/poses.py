"""Rigid motions in the three ways that a pose is written (section 7.3). Batched, any device, gradients included."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lerobot_policy_groot_n1d6.processing.embodiment import Format


def relative_pose(pose: Tensor, reference: Tensor, format: Format) -> Tensor:
    """inv(T_reference) T_pose: the pose as the reference's own frame sees it. Both [..., D], broadcast."""
    return from_matrix(inverse(to_matrix(reference, format)) @ to_matrix(pose, format), format)


def absolute_pose(relative: Tensor, reference: Tensor, format: Format) -> Tensor:
    """T_reference T_relative: undoes `relative_pose`."""
    return from_matrix(to_matrix(reference, format) @ to_matrix(relative, format), format)


def to_matrix(pose: Tensor, format: Format) -> Tensor:
    """[..., D] -> [..., 4, 4]."""
    if format is Format.DEFAULT:
        return pose.unflatten(-1, (4, 4))
    rotation = from_rot6d(pose[..., 3:]) if format is Format.XYZ_ROT6D else from_rotvec(pose[..., 3:])
    top = torch.cat([rotation, pose[..., :3, None]], dim=-1)
    bottom = pose.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


def from_matrix(matrix: Tensor, format: Format) -> Tensor:
    """[..., 4, 4] -> [..., D]."""
    if format is Format.DEFAULT:
        return matrix.flatten(-2)
    rotation, position = matrix[..., :3, :3], matrix[..., :3, 3]
    angles = rotation[..., :2, :].flatten(-2) if format is Format.XYZ_ROT6D else to_rotvec(rotation)
    return torch.cat([position, angles], dim=-1)


def inverse(matrix: Tensor) -> Tensor:
    """Of a rigid motion: R^T, -R^T p."""
    turned = matrix[..., :3, :3].transpose(-1, -2)
    moved = -turned @ matrix[..., :3, 3:]
    return torch.cat([torch.cat([turned, moved], dim=-1), matrix[..., 3:, :]], dim=-2)


def from_rot6d(rows: Tensor) -> Tensor:
    """Two rows of a rotation, made orthonormal by Gram-Schmidt, and their cross product: [..., 6] -> [..., 3, 3]."""
    first = normalize(rows[..., :3], dim=-1)
    second = rows[..., 3:]
    second = normalize(second - (first * second).sum(-1, keepdim=True) * first, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-2)


def from_rotvec(vector: Tensor) -> Tensor:
    """Rodrigues' formula. [..., 3] in radians -> [..., 3, 3]."""
    angle = vector.norm(dim=-1)[..., None, None]
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    # sinc(a / pi) = sin(a) / a and its square at half the angle are smooth at zero.
    sine, half = torch.sinc(angle / torch.pi), torch.sinc(angle / (2 * torch.pi))
    return torch.eye(3, dtype=vector.dtype, device=vector.device) + sine * cross + 0.5 * half**2 * cross @ cross


def to_rotvec(rotation: Tensor) -> Tensor:
    """[..., 3, 3] -> [..., 3] in radians, of norm at most pi; by way of quaternions, which are safe near 0 and pi."""
    quaternion = _quaternion(rotation)
    real, imaginary = quaternion[..., :1], quaternion[..., 1:]
    size = imaginary.norm(dim=-1, keepdim=True)
    # near zero, 2 atan2(s, w) / s -> 2 / w
    small = size < 1e-7
    ratio = 2 * torch.atan2(size, real) / torch.where(small, torch.ones_like(size), size)
    return torch.where(small, 2 * imaginary, ratio * imaginary)


def _quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternion (w, x, y, z), w >= 0. Of four equal expressions, the one with the largest divisor is taken."""
    r = rotation
    trace = r[..., 0, 0] + r[..., 1, 1] + r[..., 2, 2]
    diagonal = torch.stack([trace, r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]], dim=-1)
    square = torch.stack([1 + trace, *(1 + 2 * r[..., i, i] - trace for i in range(3))], dim=-1)  # 4 q_i^2
    off = {(i, j): (r[..., i, j], r[..., j, i]) for i, j in ((2, 1), (0, 2), (1, 0))}
    wx, wy, wz = (a - b for a, b in off.values())
    yz, xz, xy = (a + b for a, b in off.values())
    rows = torch.stack(
        [
            torch.stack([square[..., 0], wx, wy, wz], dim=-1),
            torch.stack([wx, square[..., 1], xy, xz], dim=-1),
            torch.stack([wy, xy, square[..., 2], yz], dim=-1),
            torch.stack([wz, xz, yz, square[..., 3]], dim=-1),
        ],
        dim=-2,
    )  # row i is 4 q_i q
    best = diagonal.argmax(dim=-1)[..., None, None].expand(*diagonal.shape[:-1], 1, 4)
    quaternion = normalize(rows.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
