"""What training is fed, and where it stands in that: the sampler, loaders that keep their position
by themselves, and the noise of a batch, which follows from which batch it is.
"""
