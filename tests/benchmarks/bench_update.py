"""What an update costs, how the loop keeps up with the simulator, and what a batch costs. `make bench` runs it.

    python tests/benchmarks/bench_update.py [update] [loop] [replay] [--quick] [--threads 1 all]

Every figure stands beside one measured in the same run: matrix products of the same FLOPs, the slower of simulator and
learner alone, a plain loop over samples. Tables are printed and kept in results/<device>.json.
"""

if __name__ == "__main__":
    # The simulator's worker processes import this file again: what is heavy stays behind this line.
    from measure import main

    main()
