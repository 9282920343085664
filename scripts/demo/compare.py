"""Both sides row by row: what the shop's tables say against what Tryton says over its own RPC."""

from collections import defaultdict
from decimal import Decimal

STATUS = {"draft": "placed", "quotation": "quoted"}


def number(value):
    """A decimal of Tryton's JSON, of PostgreSQL, or a float, without trailing zeros."""
    if isinstance(value, dict):
        value = value["decimal"]
    return format(Decimal(str(value)).normalize(), "f")


def differences(name, left, right):
    """What is on one side only or differs, as lines of text."""
    for key in sorted(left.keys() | right.keys(), key=str):
        if key not in right:
            yield f"{name} {key}: only in the shop: {left[key]}"
        elif key not in left:
            yield f"{name} {key}: only on the other side: {right[key]}"
        elif left[key] != right[key]:
            yield f"{name} {key}: {left[key]} in the shop, {right[key]} on the other side"


def once(records, key):
    """Records by key; a second one with the same key is an error of its own."""
    found = {}
    for record in records:
        if key(record) in found:
            raise AssertionError(f"doubled: {key(record)}: {record} and {found[key(record)]}")
        found[key(record)] = record
    return found


def customers(world, erp, crm):
    rows = world.rows("SELECT 'C' || id, name, email, street, postal_code, city FROM customers")
    shop = {row[0]: row[1:] for row in rows}
    fields = ["code", "name", "email", "addresses"]
    addresses = {address["id"]: (address["street"], address["postal_code"], address["city"])
                 for address in erp.search("party.address", [], ["street", "postal_code", "city"])}
    ours = [["code", "like", "C%"]]
    parties = once(erp.search("party.party", ours, fields), lambda party: party["code"])
    parties = {code: (party["name"], party["email"], *addresses.get(next(iter(party["addresses"]), None), ()))
               for code, party in parties.items()}
    contacts = once(crm.search("party.party", ours, ["code", "name", "email"]), lambda party: party["code"])
    contacts = {code: (party["name"], party["email"]) for code, party in contacts.items()}
    yield "customers = parties of the ERP", len(shop), list(differences("customer", shop, parties))
    yield "customers = parties of the CRM", len(shop), list(
        differences("contact", {code: row[:2] for code, row in shop.items()}, contacts))


def catalogue(world, erp):
    shop = {sku: (name, number(price)) for sku, name, price in world.rows("SELECT sku, name, price FROM products")}
    products = erp.search("product.product", [], ["code", "name", "list_price_used"])
    products = once(products, lambda product: product["code"])
    products = {code: (product["name"], number(product["list_price_used"])) for code, product in products.items()}
    yield "products = products of the ERP", len(shop), list(differences("product", shop, products))

    shop = dict(world.rows("SELECT sku, on_hand FROM inventory JOIN products ON id = product_id"))
    storage = erp.search("stock.location", [["code", "=", "STO"]])[0]["id"]
    stock = erp.call("model.product.product.search_read", [], 0, None, None, ["code", "quantity"], locations=[storage])
    stock = {product["code"]: int(product["quantity"]) for product in stock}
    yield "inventory = stock of the ERP", len(shop), list(differences("stock of", shop, stock))


def orders(world, erp):
    rows = world.rows("""
        SELECT o.number, 'C' || o.customer_id, o.status::text, p.sku, l.quantity, l.price
        FROM orders o JOIN order_lines l ON l.order_id = o.id JOIN products p ON p.id = l.product_id
        WHERE o.placed_at IS NOT NULL""")
    shop = defaultdict(list)
    for reference, customer, status, sku, quantity, price in rows:
        shop[reference, customer, status].append((sku, number(quantity), number(price)))
    # What refers before what is referred to: more may come between two questions.
    sales = once(erp.search("sale.sale", [], ["reference", "party", "state"]), lambda sale: sale["reference"])
    sold = erp.search("sale.line", [], ["sale", "product", "quantity", "unit_price"])
    codes = {party["id"]: party["code"] for party in erp.search("party.party", [["active", "in", [True, False]]], ["code"])}
    skus = {product["id"]: product["code"] for product in erp.search("product.product", [], ["code"])}
    lines = defaultdict(list)
    for line in sold:
        lines[line["sale"]].append((skus[line["product"]], number(line["quantity"]), number(line["unit_price"])))
    sales = {(reference, codes[sale["party"]], STATUS.get(sale["state"], sale["state"])): sorted(lines[sale["id"]])
             for reference, sale in sales.items()}
    shop = {key: sorted(value) for key, value in shop.items()}
    yield "placed orders = sales of the ERP", len(shop), list(differences("order", shop, sales))
    yield "order lines = sale lines", sum(map(len, shop.values())), (
        [] if sum(map(len, shop.values())) == sum(map(len, sales.values())) else ["their numbers differ"])


def everything(world):
    """(what, rows compared, differences) of every pair of tables."""
    erp, crm = world.tryton("erp"), world.tryton("crm")
    return [*customers(world, erp, crm), *catalogue(world, erp), *orders(world, erp)]
