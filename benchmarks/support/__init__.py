"""Parts that benchmarks share: options, problems, clocks, other libraries, reports and charts."""
