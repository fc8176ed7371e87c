"""What tests of several ranks run on every rank, by subject. Each function also runs alone, in one process without a
launcher, for the figures that the ranks have to come to. What all of them build on is in tests.helpers.trainers."""
