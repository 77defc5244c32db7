"""A communicator that adds up what the calls it is given must send, by their buffers."""


class Counting:
    """Stands for a communicator; those made from it add to the same count.

    copies : neighbours that each message of a neighbourhood's Allgather goes to
    """

    def __init__(self, comm, copies=1, count=None):
        self.comm, self.copies = comm, copies
        self.count = count if count is not None else [0]

    @property
    def sent(self):
        """Bytes that leave this rank until now."""
        return self.count[0]

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Dup(self):
        return Counting(self.comm.Dup(), self.copies, self.count)

    def Create_dist_graph_adjacent(self, senders, receivers):
        return Counting(self.comm.Create_dist_graph_adjacent(senders, receivers), len(receivers), self.count)

    def Iallreduce(self, send, *others):  # each sends what it has of the others' shares, and the sum of its own share
        self.count[0] += 2 * (self.comm.size - 1) * send.nbytes // self.comm.size
        return self.comm.Iallreduce(send, *others)

    def Iallgather(self, send, receive):
        self.count[0] += (self.comm.size - 1) * send.nbytes
        return self.comm.Iallgather(send, receive)

    def Ineighbor_allgather(self, send, receive):
        self.count[0] += self.copies * send.nbytes
        return self.comm.Ineighbor_allgather(send, receive)

    def Ineighbor_alltoall(self, send, receive):
        self.count[0] += send.nbytes
        return self.comm.Ineighbor_alltoall(send, receive)
