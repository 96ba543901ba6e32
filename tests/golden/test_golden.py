"""The library's code against numbers of the authors' own (see README.md), and that the check can fail."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import check_poco

HERE = Path(__file__).parent
GOLDEN = HERE / "poco.safetensors"


def metadata():
    with safe_open(GOLDEN, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def rows():
    return check_poco.compare(GOLDEN)


def test_all_groups_of_the_published_objective_match(rows):
    compared = {row.group: row for row in rows if row.difference is not None}
    assert set(compared) == {
        "batch", "cand", "weights", "bc", "post", "actor_loss", "grad.actor", "critic", "grad.critic"
    }  # fmt: skip
    assert all(row.difference <= 1e-5 for row in compared.values()), "\n".join(map(str, rows))


def test_every_tensor_is_compared_or_an_input(rows):
    assert sum(row.tensors for row in rows) == len(load_file(GOLDEN))
    assert {row.group for row in rows if row.difference is None} == {"init", "draw", "batch"}
    assert all(row.reason.startswith("input: ") for row in rows if row.difference is None)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("weights.temp0.1", "weights"),
        ("post.loss.temp0.1.zeta1", "post"),
        ("grad.actor.temp0.1.zeta1.l0.w", "grad.actor"),
        ("grad.critic.0.ln2.g", "grad.critic"),
        ("critic.target", "critic"),
        ("init.target_critic.1.l3.w", "cand"),
        ("batch.valid", "critic"),
        ("draw.post.t", "post"),
    ],
)
def test_a_changed_number_fails(tmp_path, name, group):
    """1e-3 on one entry of a result, or 0.5 on one of an input: a hundred times the tolerance and more."""
    tensors = load_file(GOLDEN)
    tensors[name].view(-1)[-1] -= 0.5 if name.startswith(("init", "draw", "batch")) else 1e-3
    if name == "batch.valid":
        tensors[name] = tensors[name].floor()
    save_file(tensors, tmp_path / "changed.safetensors", metadata())
    failed = {row.group for row in check_poco.compare(tmp_path / "changed.safetensors") if not row.ok}
    assert group in failed


def test_nan_fails(tmp_path):
    tensors = load_file(GOLDEN)
    tensors["cand.q"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", metadata())
    assert "cand" in {row.group for row in check_poco.compare(tmp_path / "nan.safetensors") if not row.ok}


def test_exit_status(tmp_path, capsys):
    """0 on a match, 1 on a mismatch, 2 on another file."""
    wrong, other, cut, junk = (tmp_path / f"{name}.safetensors" for name in ("wrong", "other", "cut", "junk"))
    tensors = load_file(GOLDEN)
    save_file(tensors | {"bc.loss": tensors["bc.loss"] + 1}, wrong)
    save_file({"weight": torch.ones(2)}, other)
    save_file({name: t for name, t in tensors.items() if name.startswith(("batch.", "init.", "draw."))}, cut)
    junk.write_text("no safetensors")
    assert check_poco.main([str(GOLDEN)]) == 0
    assert "ok: all within 1e-05" in capsys.readouterr().out
    assert check_poco.main([str(wrong)]) == 1
    assert [check_poco.main([str(path)]) for path in (other, cut, junk, tmp_path / "absent")] == [2, 2, 2, 2]
    assert check_poco.main([]) == 2


def test_the_message_on_another_file_says_what_is_missing(tmp_path, capsys):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    assert check_poco.main([str(tmp_path / "other.safetensors")]) == 2
    assert 'tensor "batch.actions" is missing' in capsys.readouterr().err


def test_sizes_are_read_off_the_tensors(tmp_path):
    """Half of the states and a third of the candidates' columns dropped: per-state results still match."""
    case, num = load_file(GOLDEN), 5
    tensors = {name: t for name, t in case.items() if name.startswith("init.")}
    tensors |= {name: t[:4].clone() for name, t in case.items() if name.startswith(("batch.", "draw."))}
    tensors |= {f"draw.{name}": case[f"draw.{name}"][:4, :num].clone() for name in ("cand.noise", "post.x0", "post.t")}
    tensors |= {name: case[name][:4, :num].clone() for name in ("cand.raw", "cand.q", "post.l")}
    save_file(tensors, tmp_path / "small.safetensors", metadata())
    rows = {row.group: row for row in check_poco.compare(tmp_path / "small.safetensors") if row.difference is not None}
    assert set(rows) == {"batch", "cand", "post"}
    assert all(row.ok for row in rows.values())


class Reference:
    """Whole updates as the authors' code makes them, out of plain Linear and LayerNorm layers, sharing nothing with
    the library: the golden file that is stored here has none, files of the format may."""

    def __init__(self, tensors):
        self.t = {name: value.double() for name, value in tensors.items()}
        self.actor = self.mlp("init.actor", norm=False)
        self.critics = [self.mlp(f"init.critic.{k}", norm=True) for k in range(2)]
        self.targets = [self.mlp(f"init.target_critic.{k}", norm=True).requires_grad_(False) for k in range(2)]
        parameters = [p for net in (self.actor, *self.critics) for p in net.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=3e-4)

    def mlp(self, prefix, norm):
        layers = []
        for i in range(5):
            weight = self.t[f"{prefix}.l{i}.w"]
            linear = nn.Linear(*weight.shape).double()
            linear.weight.data, linear.bias.data = weight.T.clone(), self.t[f"{prefix}.l{i}.b"].clone()
            layers.append(linear)
            if i < 4:
                layers.append(nn.GELU(approximate="tanh"))
            if i < 4 and norm:
                norm_layer = nn.LayerNorm(weight.shape[1], eps=1e-6).double()
                norm_layer.weight.data = self.t[f"{prefix}.ln{i}.g"].clone()
                norm_layer.bias.data = self.t[f"{prefix}.ln{i}.b"].clone()
                layers.append(norm_layer)
        return nn.Sequential(*layers)

    @staticmethod
    def on(net, obs, *inputs):
        lead = inputs[0].shape[:-1]
        return net(torch.cat([obs.reshape(len(obs), *[1] * (len(lead) - 1), -1).expand(*lead, -1), *inputs], dim=-1))

    @torch.no_grad()
    def sample(self, obs, noise):
        for k in range(10):
            noise = noise + self.on(self.actor, obs, noise, torch.full_like(noise[..., :1], k / 10)) / 10
        return noise.clamp(-1, 1)

    def error(self, obs, chunk, x0, t, mask):
        v = self.on(self.actor, obs, (1 - t) * x0 + t * chunk, t)
        return ((v - (chunk - x0)).square() * mask).mean(dim=-1)

    def update(self, u, stored):
        t, draw = self.t, {k.removeprefix("draw."): v for k, v in self.t.items() if k.startswith("draw.")}
        for name, value in draw.items():
            stored[f"draw.update{u}.{name}"] = (1 - value) if name.endswith(".t") else value * (-1) ** u
        draw = {name: stored[f"draw.update{u}.{name}"] for name in draw}
        obs, next_obs, valid, chunk = (
            t["batch.obs"],
            t["batch.next_obs"],
            t["batch.valid"],
            t["batch.actions"].flatten(1),
        )
        next_chunk = self.sample(next_obs, draw["critic.noise"])
        next_q = torch.stack([self.on(c, next_obs, next_chunk)[:, 0] for c in self.targets]).mean(0)
        y = t["batch.rewards_cum"][:, -1] + 0.99**5 * t["batch.masks_cum"][:, -1] * next_q
        q = torch.stack([self.on(c, obs, chunk)[:, 0] for c in self.critics])
        critic_loss = ((q - y).square() * valid[:, -1]).mean()
        x = self.sample(obs, draw["cand.noise"])
        weights = torch.softmax(torch.stack([self.on(c, obs, x)[..., 0] for c in self.targets]).mean(0) / 0.1, dim=-1)
        mask = valid.repeat_interleave(3, dim=1)
        bc_loss = self.error(obs, chunk, draw["bc.x0"], draw["bc.t"], mask).mean()
        errors = self.error(obs, x, draw["post.x0"], draw["post.t"], mask[:, None])
        post_loss = (weights * errors.clamp(max=2.0)).sum(-1).mean()
        self.optimizer.zero_grad()
        (critic_loss + bc_loss + post_loss).backward()
        before = [[p.detach().clone() for p in c.parameters()] for c in self.critics]
        self.optimizer.step()
        for k in range(2):
            for name, old, new, target in zip(
                (f"{part}{i}.{x}" for i in range(5) for part, x in (("l", "w"), ("l", "b"), ("ln", "g"), ("ln", "b"))
                 if part == "l" or i < 4),
                before[k], self.critics[k].parameters(), self.targets[k].parameters(), strict=True,
            ):  # fmt: skip
                mixed = 0.005 * new.detach() + 0.995 * target
                target.data = 0.005 * old + 0.995 * target
                for kind, p in (("critic", new.detach()), ("target_critic", target), ("target_if_new_params", mixed)):
                    stored[f"update{u}.{kind}.{k}.{name}"] = p.T if name.endswith("w") else p
        for i, layer in enumerate(self.actor[::2]):
            stored[f"update{u}.actor.l{i}.w"], stored[f"update{u}.actor.l{i}.b"] = layer.weight.T, layer.bias
        losses = {"critic_loss": critic_loss, "bc_loss": bc_loss, "post_loss": post_loss}
        losses["clip_ratio"] = (errors > 2.0).double().mean()
        stored.update({f"update{u}.{name}": value[None] for name, value in losses.items()})


@pytest.fixture(scope="module")
def with_updates(tmp_path_factory):
    """The golden file, and two whole updates by the reference above."""
    tensors = load_file(GOLDEN)
    reference, stored = Reference(tensors), {}
    for u in (1, 2):
        reference.update(u, stored)
        stored = {name: value.detach().clone().contiguous() for name, value in stored.items()}
    path = tmp_path_factory.mktemp("golden") / "updates.safetensors"
    save_file(tensors | stored, path, metadata())
    return path


def test_whole_updates_with_adam_match_a_plain_reference(with_updates):
    rows = check_poco.compare(with_updates)
    compared = {row.group: row for row in rows if row.group.startswith("update") and row.difference is not None}
    names = ("critic_loss", "bc_loss", "post_loss", "clip_ratio", "actor", "critic", "target_if_new_params")
    assert set(compared) == {f"update{u}.{name}" for u in (1, 2) for name in names}
    assert all(row.difference < 1e-9 for row in compared.values()), "\n".join(map(str, rows))
    skipped = {row.group: row.reason for row in rows if row.difference is None and row.group.startswith("update")}
    assert set(skipped) == {"update1.target_critic", "update2.target_critic"}
    assert all("Deviation 1" in reason for reason in skipped.values())


def test_the_order_of_the_target_update_is_a_deviation_indeed(with_updates):
    """What is skipped does differ: 0.005 x one Adam step of 3e-4, 1.5e-6 at most where all are equal otherwise."""
    tensors = load_file(with_updates)
    name = ["critic", "0.l0.w"][1]
    gap = (tensors[f"update1.target_critic.{name}"] - tensors[f"update1.target_if_new_params.{name}"]).abs().max()
    assert gap.item() == pytest.approx(0.005 * 3e-4, rel=0.05)


@pytest.mark.parametrize(
    "name", ["update1.actor.l2.w", "update2.critic.1.ln0.g", "update2.target_if_new_params.0.l1.w"]
)
def test_a_changed_update_fails(with_updates, tmp_path, name):
    tensors = load_file(with_updates)
    tensors[name].view(-1)[0] += 2e-5
    save_file(tensors, tmp_path / "changed.safetensors", metadata())
    failed = {row.group for row in check_poco.compare(tmp_path / "changed.safetensors") if not row.ok}
    assert failed == {name.rsplit(".", 2 if ".actor" in name else 3)[0]}


def test_metadata_states_the_constants_that_are_used():
    sizes = json.loads(metadata()["info"])["sizes"]
    assert {name: sizes[name] for name in check_poco.PUBLISHED} == check_poco.PUBLISHED
    assert check_poco.Case(GOLDEN).joint == {"eta": 0.1, "zeta": 2.0, "beta": 1.0}
