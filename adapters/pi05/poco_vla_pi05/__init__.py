"""pi0.5 for poco_vla. Heavy parts are imported by :mod:`poco_vla_pi05.adapter` only."""
