"""Packing in plain lists: the rules of data_prep/packing.py in sequence, without an index of the buffer."""


class SlowBestFit:
    """Documents are lists of tokens in order of arrival; a row is a list of tokens."""

    def __init__(self, row_tokens: int, buffer_tokens: int) -> None:
        self.row_tokens, self.buffer_tokens = row_tokens, buffer_tokens
        self.remainders: list[list[int]] = []
        self.documents: list[list[int]] = []
        self.cut = 0

    def add(self, document: list[int]) -> list[list[int]]:
        self.documents.append(document)
        rows = []
        while self.buffered() >= max(self.buffer_tokens, self.row_tokens):
            rows.append(self.row())
        return rows

    def finish(self) -> list[list[int]]:
        rows = []
        while self.buffered() >= self.row_tokens:
            rows.append(self.row())
        return rows

    def buffered(self) -> int:
        return sum(map(len, self.remainders + self.documents))

    def row(self) -> list[int]:
        row: list[int] = []
        too_long = [document for document in self.documents if len(document) > self.row_tokens]
        if self.remainders:
            self.put(row, self.remainders.pop(0), is_remainder=True)
        elif too_long:
            self.put(row, self.remove(too_long[0]))
        while len(row) < self.row_tokens:
            free = self.row_tokens - len(row)
            for document in self.choose(free):
                self.put(row, document)
        return row

    def choose(self, free: int) -> list[list[int]]:
        for document in self.documents:
            if len(document) == free:
                return [self.remove(document)]
        pairs = []
        for a, first in enumerate(self.documents):
            for b, second in enumerate(self.documents):
                if a != b and len(first) >= len(second) and len(first) + len(second) == free:
                    pairs.append((-len(first), a, b, first, second))
        if pairs:
            # Among documents of equal length the oldest is first.
            _, _, _, first, second = min(pairs, key=lambda pair: pair[:3])
            return [self.remove(first), self.remove(second)]
        fitting = [document for document in self.documents if len(document) <= free]
        if fitting:
            return [self.remove(max(fitting, key=len))]  # max returns the first of equals
        too_long = [document for document in self.documents if len(document) > self.row_tokens]
        if too_long:
            return [self.remove(too_long[0])]
        return [self.remove(max(self.documents, key=len))]

    def put(self, row: list[int], document: list[int], is_remainder: bool = False) -> None:
        free = self.row_tokens - len(row)
        row += document[:free]
        if len(document) > free:
            self.cut += not is_remainder
            self.remainders.insert(0, document[free:])

    def remove(self, document: list[int]) -> list[int]:
        place = next(place for place, other in enumerate(self.documents) if other is document)
        return self.documents.pop(place)


class SlowCrop:
    """As ``SlowBestFit``, but the rest of a document that is cut is dropped."""

    def __init__(self, row_tokens: int, buffer_tokens: int) -> None:
        self.row_tokens, self.buffer_tokens = row_tokens, buffer_tokens
        self.documents: list[list[int]] = []
        self.cut = self.dropped = 0

    def add(self, document: list[int]) -> list[list[int]]:
        self.documents.append(document)
        return self.rows_above(max(self.buffer_tokens, self.row_tokens))

    def finish(self) -> list[list[int]]:
        return self.rows_above(self.row_tokens)

    def rows_above(self, tokens: int) -> list[list[int]]:
        rows = []
        while sum(map(self.length, self.documents)) >= tokens:
            rows.append(self.row())
        return rows

    def length(self, document: list[int]) -> int:
        """How much of a row it can fill."""
        return min(len(document), self.row_tokens)

    def row(self) -> list[int]:
        row: list[int] = []
        while len(row) < self.row_tokens:
            free = self.row_tokens - len(row)
            fitting = [document for document in self.documents if self.length(document) <= free]
            # max and min return the first, that is the oldest, of equals
            document = max(fitting, key=self.length) if fitting else min(self.documents, key=self.length)
            self.documents.remove(document)
            row += document[:free]
            self.cut += len(document) > free
            self.dropped += max(len(document) - free, 0)
        return row
