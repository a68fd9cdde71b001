"""What the demo, the benchmarks and the slow tests share: real data, networks, a training loop."""
