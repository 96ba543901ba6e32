"""The conformance kit: does an adapter, or an algorithm, keep its contract?"""
