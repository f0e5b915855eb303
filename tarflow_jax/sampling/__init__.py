"""From noise to samples: decoding by schedule, and the samples' densities."""
