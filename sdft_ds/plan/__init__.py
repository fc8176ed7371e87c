"""Will it fit? What a job takes of each rank's memory and of the network, calculated from a model's configuration."""
