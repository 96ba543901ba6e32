"""Trained heads in and out of the Hugging Face Hub, and out of a run's folder into the forms that LeRobot loads."""

from poco_vla.hub.artifact import Artifact, stage
from poco_vla.hub.export import export_policy
from poco_vla.hub.fetch import load_critic, load_head, located
from poco_vla.hub.publish import Pushed, push_head

__all__ = ["Artifact", "Pushed", "export_policy", "load_critic", "load_head", "located", "push_head", "stage"]
