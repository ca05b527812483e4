"""What more than one example, or a benchmark, needs and what is not about gradient noise.

Problems with their verifiers, the policy and how it is sampled, a run on disk, and the command line with its progress
bars, table and pictures. Whatever the library is used for stands in the scripts, where readers look for it.
"""
