"""Will it fit? Memory per rank and network traffic of a job, calculated from the model's configuration."""
