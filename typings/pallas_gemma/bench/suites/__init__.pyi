from bench.suites import published as published
