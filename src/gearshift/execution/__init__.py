"""How a network is run under a decision: plan, stream, memory, executor and the table of costs."""
