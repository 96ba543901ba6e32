"""The conformance kit: does an adapter keep the contract of :class:`poco_vla.policy.FlowPolicy`?"""
