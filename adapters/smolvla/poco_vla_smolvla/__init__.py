"""SmolVLA for poco_vla. Heavy parts are imported by :mod:`poco_vla_smolvla.adapter` only."""
