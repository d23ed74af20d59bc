"""What the benchmarks share: options, problems, clocks, peers, reports and charts."""
