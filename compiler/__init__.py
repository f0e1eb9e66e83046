"""From statistics to a plan: an intermediate representation, passes over it, a cost model and the command."""
