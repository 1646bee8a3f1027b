"""Writes small PDFs for tests."""

import zlib


def make_pdf(pages: list[bytes], title: str = "", packed: bool = False) -> bytes:
    """Returns a PDF with these pages' content streams; text is in Helvetica."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>".encode()]
    objects.append(b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>")
    for i, content in enumerate(pages):
        data = zlib.compress(content, 1) if packed else content
        about = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F1 3 0 R>>>>/Contents {5 + 2 * i} 0 R>>"
        objects += [about.encode(), b"<</Length %d%s>>stream\n%s\nendstream" % (len(data), b"/Filter/FlateDecode" * packed, data)]
    objects.append(b"<</Title(%s)>>" % title.encode())
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer<</Size %d/Root 1 0 R/Info %d 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(objects), len(out))
    return bytes(out) + b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table) + trailer


def lines(*told: str) -> bytes:
    """Returns the content stream of a page with these lines."""
    return b"BT /F1 12 Tf 50 700 Td 14 TL " + b" T* ".join(f"({line}) Tj".encode() for line in told) + b" ET"
