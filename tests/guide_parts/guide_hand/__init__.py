"""A plug-in for LeRobot's and our commands: `--teleop.type=guide_hand`, a person without an arm.

Importing it also sends whatever asks for the real Hub to the one of the test: `RepoCard.validate`, which LeRobot's push
of a dataset calls, has the real address in its code.
"""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

from poco_vla.robots.simulated import ACTION

HUB = urlsplit(os.environ["HF_ENDPOINT"])


@TeleoperatorConfig.register_subclass("guide_hand")
@dataclass(kw_only=True)
class GuideHandConfig(TeleoperatorConfig):
    pass


class GuideHand(Teleoperator):
    """Moves the simulated arm to and fro, so that no action has an empty range."""

    config_class = GuideHandConfig
    name = "guide_hand"
    action_features: dict = dict.fromkeys(ACTION, float)
    feedback_features: dict = {}  # noqa: RUF012
    is_connected = False
    is_calibrated = True
    _there = False

    def connect(self, calibrate=True):
        self.is_connected = True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_action(self):
        self._there = not self._there
        return dict.fromkeys(self.action_features, 0.5 if self._there else -0.5)

    def send_feedback(self, feedback):
        pass

    def disconnect(self):
        self.is_connected = False


def client():
    made = default_client_factory()
    made.event_hooks["request"].append(to_hub)
    return made


def to_hub(request):
    request.url = request.url.copy_with(scheme=HUB.scheme, host=HUB.hostname, port=HUB.port)


set_client_factory(client)
