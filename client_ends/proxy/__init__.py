"""``splitfl proxy``: OpenAI's HTTP interface on the client's machine. Prompts and answers stay here; to the trunk
travel hidden states, as ever.
"""
