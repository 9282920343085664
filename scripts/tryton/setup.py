#!/usr/bin/env python3
"""Fills two fresh Tryton databases through RPC, always with the same records: an ERP (company, products, stock) and a
CRM (parties only). Prints the two REST keys, the ERP's first.

    setup.py ADDRESS ERP_DATABASE CRM_DATABASE
"""

import datetime
import sys
from decimal import Decimal

from client import Tryton, date, decimal, wait_until_up

KINDS = [
    ("Wool Blanket", "BLK", ["Fjord", "Dune", "Heather", "Slate"], "129.00"),
    ("Linen Towel", "TWL", ["Sand", "Indigo", "Moss", "Rust", "White"], "24.50"),
    ("Stoneware Mug", "MUG", ["Speckled", "Celadon", "Ink", "Chalk", "Ochre", "Rose"], "18.00"),
    ("Dinner Plate", "PLT", ["Speckled", "Celadon", "Ink", "Chalk"], "26.90"),
    ("Soup Bowl", "BWL", ["Speckled", "Celadon", "Ink", "Chalk"], "21.40"),
    ("Oak Cutting Board", "BRD", ["Small", "Medium", "Large"], "39.95"),
    ("Carbon Steel Pan", "PAN", ["20 cm", "24 cm", "28 cm", "32 cm"], "64.00"),
    ("Chef's Knife", "KNF", ["16 cm", "20 cm", "24 cm"], "89.00"),
    ("Brass Lamp", "LMP", ["Desk", "Wall", "Floor"], "149.00"),
    ("Beeswax Candle", "CND", ["Pillar", "Taper, pair", "Votive, six"], "14.20"),
    ("Wicker Basket", "BSK", ["Round", "Oval", "Laundry"], "47.30"),
    ("Cotton Apron", "APR", ["Natural", "Charcoal", "Olive"], "34.00"),
    ("Enamel Kettle", "KTL", ["Cream", "Forest", "Black"], "58.75"),
    ("Tea Caddy", "TEA", ["100 g", "250 g"], "16.85"),
    ("Coffee Grinder", "GRD", ["Hand", "Wall-mounted"], "72.40"),
    ("Walnut Stool", "STL", ["Low", "Bar"], "185.00"),
    ("Jute Rug", "RUG", ["80 x 150", "140 x 200", "200 x 300"], "119.00"),
    ("Glass Carafe", "CRF", ["0.5 l", "1 l"], "27.60"),
    ("Salt Cellar", "SLT", ["Beech"], "12.95"),
]


def products():
    """(code, name, list price, quantity on hand) of every product."""
    number = 0
    for kind, prefix, variants, price in KINDS:
        for position, variant in enumerate(variants):
            number += 1
            step = (Decimal(price) * position / 20).quantize(Decimal("0.05"))
            yield f"{prefix}-{position + 1:02}", f"{kind}, {variant}", Decimal(price) + step, number * 37 % 180


def set_up_erp(erp):
    currency, = erp.create("currency.currency", {
        "name": "Euro", "code": "EUR", "symbol": "€", "rounding": decimal("0.01"), "digits": 2})
    party, = erp.create("party.party", {"name": "Harbour & Hearth GmbH"})
    company, = erp.create("company.company", {"party": party, "currency": currency})
    assert company == 1, "a fresh database: the shipped connectors name company 1"
    erp.write("res.user", [erp.uid], {"companies": [["add", [company]]], "company": company})
    erp.context = {"company": company}
    unit = erp.search("product.uom", [["symbol", "=", "u"]])[0]["id"]
    catalogue = list(products())
    erp.create("product.template", *[{
        "name": name, "code": code, "type": "goods", "default_uom": unit, "salable": True, "sale_uom": unit,
        "list_price": decimal(price), "products": [["create", [{}]]],
    } for code, name, price, _ in catalogue])
    ids = {product["code"]: product["id"] for product in erp.search("product.product", [], ["code"])}
    storage = erp.search("stock.location", [["code", "=", "STO"]])[0]["id"]
    inventory, = erp.create("stock.inventory", {
        "company": company, "location": storage, "date": date(datetime.date.today()),
        "lines": [["create", [{"product": ids[code], "quantity": quantity}
                              for code, _, _, quantity in catalogue if quantity]]]})
    erp.call("model.stock.inventory.confirm", [inventory])
    return erp.application_key()


def main(address, erp, crm):
    wait_until_up(address)
    print(set_up_erp(Tryton(address, erp)))
    print(Tryton(address, crm).application_key())


if __name__ == "__main__":
    main(*sys.argv[1:])
