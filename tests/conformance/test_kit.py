"""check_policy passes what keeps the contract and says in words what does not."""

from dataclasses import dataclass, replace
from threading import Lock

import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp, MlpPrefix
from torch import nn
from torch.nn import functional as F

from poco_vla import FlowPolicy, PolicyError, check_policy


def complaint(policy, **options):
    with pytest.raises(PolicyError) as error:
        check_policy(policy, **options)
    return str(error.value)


def test_a_sound_adapter_passes():
    check_policy(FlowMlp.tiny())
    check_policy(FlowMlp.tiny(seed=1), FlowMlp.tiny().example_obs(5, seed=3), seed=4)


def test_nothing_is_left_changed():
    policy = FlowMlp.tiny()
    policy.train()
    policy.model.eval()
    first = next(policy.head.parameters())
    first.grad = torch.ones_like(first)
    modes = [module.training for module in policy.modules()]
    weights = [p.clone() for p in policy.parameters()]
    state = torch.get_rng_state()
    check_policy(policy)
    assert [module.training for module in policy.modules()] == modes
    assert all(torch.equal(p, w) for p, w in zip(policy.parameters(), weights, strict=True))
    assert [p.grad is not None for p in policy.head.parameters()].count(True) == 1
    assert torch.equal(torch.get_rng_state(), state)


class MirroredTime(FlowMlp):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, 1 - t)


class WrongSign(FlowMlp):
    def velocity(self, prefix, x, t):
        return -super().velocity(prefix, x, t)


class MirroredTimeAndSign(FlowMlp):
    """pi0.5's own convention, not converted."""

    def velocity(self, prefix, x, t):
        return -super().velocity(prefix, x, 1 - t)


class OtherSteps(FlowMlp):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.spec = replace(self.spec, flow_steps=8)


class ClippedSample(FlowMlp):
    def native_sample(self, obs, noise):
        return super().native_sample(obs, noise).clamp(-1, 1)


class UnrelatedSample(FlowMlp):
    def native_sample(self, obs, noise):
        return noise.flip(-1)


class SharedTime(FlowMlp):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, t[:, :1].expand_as(t))


class MeanTime(FlowMlp):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, t.mean(dim=1, keepdim=True).expand_as(t))


class NoTime(FlowMlp):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, torch.zeros_like(t))


class MixedCandidates(FlowMlp):
    """As attention among candidates does; a single one is right."""

    def velocity(self, prefix, x, t):
        v = super().velocity(prefix, x, t)
        return v + 0.1 * (v.mean(dim=1, keepdim=True) - v)


class MutatingVelocity(FlowMlp):
    def velocity(self, prefix, x, t):
        v = super().velocity(prefix, x, t)
        prefix.features.add_(0.1)
        return v


class NotPacked(FlowMlp):
    """Has a prefix of its own kind and does not say how it is stored."""

    pack, unpack = FlowPolicy.pack, FlowPolicy.unpack


class GrowingPrefix(MlpPrefix):
    calls = 0


class GrowingCache(NotPacked):
    """What a KV cache does that is appended to at every call: nothing of it shows in the features."""

    def encode(self, obs):
        return GrowingPrefix(super().encode(obs).features)

    def velocity(self, prefix, x, t):
        object.__setattr__(prefix, "calls", prefix.calls + 1)
        return super().velocity(prefix, x, t) * prefix.calls


class OverwritesInput(FlowMlp):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x.mul_(0.5), t)


class RandomVelocity(FlowMlp):
    def velocity(self, prefix, x, t):
        return F.dropout(super().velocity(prefix, x, t), 0.1, training=True)


class LeakyBackbone(FlowMlp):
    """An encoder of its own that nobody froze, run with gradient."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.backbone = nn.Linear(6, 6)

    def encode(self, obs):
        return MlpPrefix(self.backbone(self.model.features(dict(obs))))

    def native_sample(self, obs, noise):
        return self.model.sample(self.encode(obs).features, noise)


class TrainModeBackbone(LeakyBackbone):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def encode(self, obs):
        with torch.no_grad():
            return MlpPrefix(F.dropout(super().encode(obs).features, 0.3, training=self.training))


class BatchNormBackbone(TrainModeBackbone):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.norm = nn.BatchNorm1d(6, affine=False)

    def encode(self, obs):
        with torch.no_grad():
            return MlpPrefix(self.norm(self.model.features(dict(obs))))


class StatesSeeEachOther(FlowMlp):
    def encode(self, obs):
        features = super().encode(obs).features
        return MlpPrefix(features - features.mean(dim=0))


class WrongSelect(FlowMlp):
    def encode(self, obs):
        prefix = super().encode(obs)
        object.__setattr__(prefix, "select", lambda index: MlpPrefix(prefix.features[:1]))
        return prefix


class NanFeatures(FlowMlp):
    def encode(self, obs):
        features = super().encode(obs).features.clone()
        features[0, 0] = torch.nan
        return MlpPrefix(features)


class WrongFeatureDim(FlowMlp):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.feature_dim = 7


class FlatVelocity(FlowMlp):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, t).flatten(0, 1)


class HalfVelocity(FlowMlp):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, t).bfloat16()


class FrozenHead(FlowMlp):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.head.requires_grad_(False)


class DetachedHead(FlowMlp):
    @torch.no_grad()
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, t)


class UnusedWeight(FlowMlp):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.head.spare = nn.Parameter(torch.zeros(2))

    def save_pretrained(self, path):
        spare, self.head.spare = self.head.spare, None
        super().save_pretrained(path)
        self.head.spare = spare


class ImpatientTime(FlowMlp):
    def sample_time(self, shape, generator=None):
        return 2 * torch.rand(shape)


class CannotSave(FlowMlp):
    def save_pretrained(self, path):
        raise NotImplementedError


class ForgetfulLoad(FlowMlp):
    @classmethod
    def from_pretrained(cls, repo_or_path, **options):
        return cls.tiny(seed=9)


class Padded(FlowMlp):
    """A network of width 5 for 3 real dimensions, which it cuts out, as it should."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.spec = replace(self.spec, width=5)

    def velocity(self, prefix, x, t):
        return F.pad(super().velocity(prefix, x[..., :3], t), (0, 2))

    def native_sample(self, obs, noise):
        return F.pad(super().native_sample(obs, noise[..., :3]), (0, 2))


class PaddingRead(Padded):
    """Reads what the model's own sampler does not."""

    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, t) + F.pad(
            x[..., 3:].mean(dim=-1, keepdim=True).expand_as(x[..., :3]), (0, 2)
        )


class NoiseInPadding(PaddingRead):
    """Reads the noise in its padded dimensions, as its own sampler does: what pi0.5 and GR00T were trained with."""

    def native_sample(self, obs, noise):
        x, prefix, steps = noise[:, None], self.encode(obs), self.spec.flow_steps
        for k in range(steps):
            x = x + self.velocity(prefix, x, torch.full(x.shape[:2], k / steps)) / steps
        return x[:, 0]


class WholeNetwork(PaddingRead):
    """Reads the noise in its padded dimensions and moves it, as its own sampler does."""

    def network(self, prefix, x, t):
        moved = F.pad(0.5 * x[..., 3:], (3, 0))
        return PaddingRead.velocity(self, prefix, x, t) + moved

    velocity = network

    def native_sample(self, obs, noise):
        x, prefix, steps = noise[:, None], self.encode(obs), self.spec.flow_steps
        for k in range(steps):
            x = x + self.network(prefix, x, torch.full(x.shape[:2], k / steps)) / steps
        return x[:, 0]


class PaddingZeroed(WholeNetwork):
    def velocity(self, prefix, x, t):
        return F.pad(self.network(prefix, x, t)[..., :3], (0, 2))


class PaddingCut(WholeNetwork):
    """Keeps from the network what it was trained with."""

    def velocity(self, prefix, x, t):
        return Padded.velocity(self, prefix, x, t)


class PaddingCounted(Padded):
    """Takes the network's width for the robot's."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.spec = replace(self.spec, action_dim=5)

    def native_sample(self, obs, noise):
        return torch.cat([super().native_sample(obs, noise)[..., :3], noise[..., 3:]], dim=-1)


# A memory of an earlier question. Each of these is right at its first call.


class ChunkKeptInPrefix(FlowMlp):
    def velocity(self, prefix, x, t):
        first = vars(prefix).setdefault("chunk", x)
        return super().velocity(prefix, first, t)


class TimeKeptInPrefix(FlowMlp):
    def velocity(self, prefix, x, t):
        first = vars(prefix).setdefault("time", t)
        return super().velocity(prefix, x, first)


class AnswerKeptInPrefix(FlowMlp):
    def velocity(self, prefix, x, t):
        if "answer" not in vars(prefix):
            vars(prefix)["answer"] = super().velocity(prefix, x, t)
        return vars(prefix)["answer"]


class SharedTimeKeptInPrefix(FlowMlp):
    """Embeds the time that all candidates share once for a prefix: once too few, since it changes with every step."""

    takes_shared_time = True

    def velocity(self, prefix, x, t):
        if t.shape == (1, 1):
            t = vars(prefix).setdefault("time", t)
        return super().velocity(prefix, x, t.expand(x.shape[:2]))


class MemoOfPolicy(FlowMlp):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.memo = {}


class ChunkKeptInPolicy(MemoOfPolicy):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, self.memo.setdefault(x.shape, x), t)


class TimeKeptInPolicy(MemoOfPolicy):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, self.memo.setdefault(t.shape, t))


class TimeKeptByPrefix(MemoOfPolicy):
    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, self.memo.setdefault(id(prefix), t))


class ChunkOfLastPrefix(FlowMlp):
    last = None, None

    def velocity(self, prefix, x, t):
        if self.last[0] is not prefix:
            self.last = prefix, x
        return super().velocity(prefix, self.last[1], t)


class RightMemo(MemoOfPolicy):
    """Remembers what belongs to a prefix, and times under their own values."""

    def velocity(self, prefix, x, t):
        vars(prefix).setdefault("doubled", prefix.features * 2)
        self.memo[prefix.features.data_ptr()] = vars(prefix)["doubled"]
        times = self.memo.setdefault(tuple(t.flatten().tolist()), t.clone())
        return super().velocity(MlpPrefix(vars(prefix)["doubled"] / 2), x, times)


class CannotBeCopied(FlowMlp):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.lock = Lock()


# A stored prefix, while the head trains.


@dataclass(frozen=True)
class KeysPrefix:
    features: torch.Tensor
    keys: torch.Tensor

    def select(self, index):
        return KeysPrefix(self.features[index], self.keys[index])

    def to(self, device):
        return KeysPrefix(self.features.to(device), self.keys.to(device))


class HeadInFeatures(FlowMlp):
    """The critic's features go through a weight that trains."""

    @torch.no_grad()
    def encode(self, obs):
        features = super().encode(obs).features
        return MlpPrefix(features + next(self.head.parameters()).mean())

    def native_sample(self, obs, noise):
        return self.model.sample(self.encode(obs).features, noise)


class KeysOfHead(NotPacked):
    """Keys that the head makes lie in the prefix, and nowhere else."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.head.to_keys = nn.Parameter(torch.full((6,), 0.5))

    def keys(self, features):
        return features * self.head.to_keys

    @torch.no_grad()
    def encode(self, obs):
        features = super().encode(obs).features
        return KeysPrefix(features, self.keys(features))

    def velocity(self, prefix, x, t):
        return super().velocity(MlpPrefix(prefix.features + prefix.keys), x, t)

    def native_sample(self, obs, noise):
        prefix = self.encode(obs)
        return self.model.sample(prefix.features + prefix.keys, noise)

    def save_pretrained(self, path):
        weight, self.head.to_keys = self.head.to_keys, None
        super().save_pretrained(path)
        self.head.to_keys = weight


class KeysMadeAnew(KeysOfHead):
    """As GR00T: kept for sampling, made anew where gradients are recorded."""

    def velocity(self, prefix, x, t):
        if torch.is_grad_enabled():
            prefix = KeysPrefix(prefix.features, self.keys(prefix.features))
        return super().velocity(prefix, x, t)


class KeysMadeAtFirstUse(KeysOfHead):
    def velocity(self, prefix, x, t):
        keys = vars(prefix).setdefault("made", self.keys(prefix.features))
        return super().velocity(KeysPrefix(prefix.features, keys), x, t)


# What a store keeps of a state.


class PacksFeatures(KeysMadeAnew):
    """Right: what the head makes is not stored."""

    def pack(self, prefix):
        return [{"features": features} for features in prefix.features]

    @torch.no_grad()
    def unpack(self, states):
        features = torch.stack([state["features"] for state in states])
        return KeysPrefix(features, self.keys(features))


class PacksRounded(FlowMlp):
    def pack(self, prefix):
        return [{"features": features.to(torch.float8_e4m3fn)} for features in prefix.features]

    def unpack(self, states):
        return super().unpack([{"features": state["features"].float()} for state in states])


class PacksTooFew(FlowMlp):
    def pack(self, prefix):
        return super().pack(prefix)[:-1]


class PacksPadding(FlowMlp):
    """As keys padded to the batch's longest state."""

    def pack(self, prefix):
        return [state | {"places": torch.zeros(len(prefix.features))} for state in super().pack(prefix)]


class UnpacksByCompany(FlowMlp):
    """Right for as many states as were packed together."""

    def unpack(self, states):
        return MlpPrefix(super().unpack(states).features * len(states) / 3)


class PacksKeysOfHead(PacksFeatures):
    def pack(self, prefix):
        return [state | {"keys": keys} for state, keys in zip(super().pack(prefix), prefix.keys, strict=True)]

    def unpack(self, states):
        return KeysPrefix(*(torch.stack([state[name] for state in states]) for name in ("features", "keys")))


class UnpacksWithOldWeights(PacksFeatures):
    """Where weights were kept in another dtype once, for instance. With gradients all is made anew."""

    old = None

    @torch.no_grad()
    def unpack(self, states):
        self.old = self.head.to_keys.clone() if self.old is None else self.old
        features = torch.stack([state["features"] for state in states])
        return KeysPrefix(features, features * self.old)


class HiddenGradient(NotPacked):
    """A tensor that requires grad and is no parameter: none of the features shows it."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.gain = torch.full((6,), 0.5, requires_grad=True)

    def encode(self, obs):
        features = super().encode(obs).features
        return KeysPrefix(features, features * self.gain)

    def velocity(self, prefix, x, t):
        return super().velocity(MlpPrefix(prefix.features + prefix.keys), x, t)

    def native_sample(self, obs, noise):
        prefix = self.encode(obs)
        return self.model.sample((prefix.features + prefix.keys).detach(), noise)


class OtherFunctionUnderGradient(FlowMlp):
    """Two paths, and only the one that samples converts the model's time."""

    def velocity(self, prefix, x, t):
        return super().velocity(prefix, x, 1 - t if torch.is_grad_enabled() else t)


@pytest.mark.parametrize("adapter", [Padded, NoiseInPadding, WholeNetwork, RightMemo, KeysMadeAnew, PacksFeatures])
def test_sound_adapters_of_other_kinds_pass(adapter):
    check_policy(adapter.tiny())


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (MirroredTime, ["time convention: ", "the time is mirrored", "pass it 1 - t"]),
        (WrongSign, ["time convention: ", "the velocity has the wrong sign", "negate"]),
        (MirroredTimeAndSign, ["time convention: ", "time is mirrored and the sign is wrong"]),
        (OtherSteps, ["time convention: ", "agreement returns with 5 steps", "spec.flow_steps = 5"]),
        (ClippedSample, ["time convention: ", "native_sample clips"]),
        (UnrelatedSample, ["time convention: ", "Neither mirrored time nor the sign"]),
        (SharedTime, ["candidate times: ", "own t[b, j]", "time of candidate 0 is used for all"]),
        (MeanTime, ["candidate times: ", "mean time of a state is used for all"]),
        (NoTime, ["velocity: ", "the flow time does not reach the network"]),
        (MixedCandidates, ["candidates: ", "depends on the candidates beside it", "mask attention"]),
        (MutatingVelocity, ["purity: ", "changes prefix.features in place", "work on a copy"]),
        (GrowingCache, ["purity: ", "changes the prefix", "KV cache grows"]),
        (OverwritesInput, ["purity: ", "inputs x or t in place"]),
        (RandomVelocity, ["purity: ", "velocity is random"]),
        (LeakyBackbone, ["gradients: ", "backbone.weight, backbone.bias does", "flows into backbone.weight",
                         "features requires grad", "requires_grad_(False)"]),
        (TrainModeBackbone, ["encode: ", "two prefixes of the same observations are not equal", "eval mode"]),
        (BatchNormBackbone, ["encode: ", "changes the buffer norm.running_mean", "policy.train() changes the prefix"]),
        (StatesSeeEachOther, ["prefix.select: ", "encoding that state alone", "states see each other"]),
        (WrongSelect, ["prefix.select: ", "select([1]) is not what encoding that state alone gives"]),
        (NanFeatures, ["1 of 18 features are NaN"]),
        (WrongFeatureDim, ["encode: ", "[3, 6]", "feature_dim=7", "nothing else could be checked"]),
        (FlatVelocity, ["velocity: ", "[B, N, H, A] = [3, 3, 4, 3]"]),
        (HalfVelocity, ["velocity: ", "torch.bfloat16 for x of torch.float32", "cast"]),
        (FrozenHead, ["gradients: ", "no parameter of policy.head requires grad"]),
        (DetachedHead, ["gradients: ", "reaches none of the head's 6 trainable parameters"]),
        (UnusedWeight, ["gradients: ", "does not reach the head parameter spare"]),
        (ImpatientTime, ["sample_time: ", "expected [0, 1]", "generators of one seed"]),
        (CannotSave, ["save and load: ", "raised NotImplementedError"]),
        (ForgetfulLoad, ["save and load: ", "gives another velocity"]),
        (PaddingRead, ["padding: ", "reads the padded dimensions of x", "Cut x to action_dim",
                       "when their noise is zero"]),
        (PaddingCut, ["padding: native_sample reads the padded dimensions of the noise", "Pass x whole",
                      "time convention: ", "velocity leaves out the padded dimensions of x"]),
        (PaddingZeroed, ["time convention: ", "velocity is zero in the padded dimensions", "network's whole output"]),
        (PaddingCounted, ["padding: spec.action_dim is 5, but postprocess takes actions of 3", "spec.action_dim = 3"]),
        (ChunkKeptInPrefix, ["memory: ", "remembers the chunk of an earlier call", "in the prefix, whose next"]),
        (TimeKeptInPrefix, ["memory: ", "the time of an earlier call", "in the prefix, whose next"]),
        (AnswerKeptInPrefix, ["memory: ", "the time and the chunk of an earlier call", "in the prefix, whose next"]),
        (SharedTimeKeptInPrefix, ["memory: ", "the time of an earlier call", "in the prefix, whose next"]),
        (ChunkKeptInPolicy, ["memory: ", "the chunk of an earlier call", "in the policy, where a call on any prefix"]),
        (TimeKeptInPolicy, ["memory: ", "the time of an earlier call", "in the policy, where a call on any prefix"]),
        (TimeKeptByPrefix, ["memory: ", "the time of an earlier call", "kept in the policy, under the prefix"]),
        (ChunkOfLastPrefix, ["memory: ", "the chunk of an earlier call", "kept in the policy, under the prefix"]),
        (CannotBeCopied, ["copy: copy.deepcopy(policy) raises TypeError", "keep locks"]),
        (HeadInFeatures, ["stored prefix: ", "the head's layers.0.weight changed", "its features differ",
                          "move that into velocity, or freeze it"]),
        (KeysOfHead, ["stored prefix: ", "the head's to_keys changed", "the velocity on it differs",
                      "move that into velocity, or freeze it"]),
        (KeysMadeAtFirstUse, ["stored prefix: velocity keeps what the head's to_keys made", "make it anew"]),
        (HiddenGradient, ["stored prefix: the prefix carries gradient beside its features", "torch.no_grad()"]),
        (OtherFunctionUnderGradient, ["gradients: velocity is not the same function where gradients are recorded"]),
        (PacksRounded, ["packing: unpack(pack(prefix)) is not the prefix: features, they differ"]),
        (PacksTooFew, ["packing: pack gives 2 states, expected a mapping of tensors for each of 3"]),
        (PacksPadding, ["packing: pack stores state 0 in other shapes", "valid tokens only"]),
        (UnpacksByCompany, ["packing: a stored state is another in other company: features", "without padding"]),
        (PacksKeysOfHead, ["packing: pack stores what the head makes: keys differs", "unpack make the rest anew"]),
        (UnpacksWithOldWeights, ["packing: a stored state is not what encode gives once", "by those of now"]),
    ],
)  # fmt: skip
def test_a_broken_adapter_is_told_what_is_wrong(adapter, words):
    message = complaint(adapter.tiny())
    assert message.startswith(f"{adapter.__name__} breaks the contract of poco_vla.FlowPolicy in ")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "adapter",
    [
        MirroredTime,
        WrongSign,
        OtherSteps,
        ClippedSample,
        MixedCandidates,
        SharedTime,
        CannotSave,
        FrozenHead,
        UnusedWeight,
        GrowingCache,
        PaddingZeroed,
        PaddingCounted,
        ChunkKeptInPrefix,
        TimeKeptInPrefix,
        AnswerKeptInPrefix,
        SharedTimeKeptInPrefix,
        CannotBeCopied,
        HeadInFeatures,
        KeysOfHead,
        KeysMadeAtFirstUse,
        HiddenGradient,
        OtherFunctionUnderGradient,
        PacksRounded,
        PacksTooFew,
        PacksPadding,
        UnpacksByCompany,
        PacksKeysOfHead,
        UnpacksWithOldWeights,
    ],
)
def test_one_mistake_is_one_point(adapter):
    """No avalanche: a candidates' mix-up or a shared time leaves the sampler of one candidate right, for instance."""
    assert "in 1 point:\n1. " in complaint(adapter.tiny())


@pytest.mark.parametrize("adapter", [ChunkKeptInPolicy, TimeKeptInPolicy, TimeKeptByPrefix, ChunkOfLastPrefix])
def test_a_policy_that_answers_earlier_questions_is_asked_no_more(adapter):
    message = complaint(adapter.tiny())
    assert [line.split(":")[0] for line in message.splitlines()[1:]] == [
        "1. memory",
        "2. nothing else could be checked before these points are mended",
    ]


def test_weights_are_back_even_where_a_stored_prefix_was_found_stale():
    policy = KeysOfHead.tiny()
    weights = [p.clone() for p in policy.parameters()]
    complaint(policy)
    assert all(torch.equal(p, w) for p, w in zip(policy.parameters(), weights, strict=True))
    assert all(p.requires_grad for p in policy.head.parameters())


def test_all_points_are_listed_at_once():
    class Several(MirroredTime, LeakyBackbone, CannotSave, ImpatientTime):
        pass

    message = complaint(Several.tiny())
    for title in ("sample_time: ", "encode: ", "time convention: ", "gradients: ", "save and load: "):
        assert title in message
    assert message.count("\n") == int(message.split(" points")[0].split()[-1])


def test_a_missing_method_does_not_end_the_check():
    class NoSampler(CannotSave):
        native_sample = None

    message = complaint(NoSampler.tiny())
    assert "time convention: raised TypeError" in message
    assert "save and load: raised NotImplementedError" in message


def test_two_states_are_the_least():
    assert "hold 1 state, the checks need at least 2" in complaint(FlowMlp.tiny(), obs=FlowMlp.tiny().example_obs(1))


def test_tolerance_is_the_callers():
    """A velocity that is off by 1e-3 in relation to the model's own sampler."""

    class Rounded(FlowMlp):
        def velocity(self, prefix, x, t):
            return super().velocity(prefix, x, t) + 1e-3

    assert "time convention" in complaint(Rounded.tiny())
    check_policy(Rounded.tiny(), atol=0.05)
