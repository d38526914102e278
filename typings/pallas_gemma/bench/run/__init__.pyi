from bench.run import sources as sources
